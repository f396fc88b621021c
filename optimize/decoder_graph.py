"""A causal language model of transformers as our own ONNX graph, checked against torch on the runner that serves it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from transformers import PreTrainedModel

from fettle.errors import FettleError, PassError
from fettle.manifest import DecoderSpec
from optimize.decoder_graph_nodes import write_graph
from optimize.decoder_graph_parts import Floats, Parts
from optimize.export import largest_difference, save_graph
from workers.engine import EngineOptions
from workers.onnx_decoder import GraphRunner

TOLERANCE = 1e-4
# Of the texts that torch and the graph are compared on.
LENGTHS = (17, 5, 11)
DECODED = 3
SHORTEST_CONTEXT = 8


def export_decoder(model: PreTrainedModel, path: Path, context: int | None = None) -> dict[str, JsonValue]:
    """Write `path`, one file unless it exceeds 2 GB.

    Args:
        model: a causal language model in float32, in eval mode.
        context: bounds the tokens of a slot further than the model does.

    Returns the largest difference from torch's logits.

    Raises:
        PassError: something in the model that the graph cannot say exactly; a context of a few tokens; ONNX Runtime
            does not run the graph; or its logits on random texts differ from torch's by more than `TOLERANCE`
            (absolute, or relative to the largest one where that exceeds 1).
    """
    parts = Parts(model, context)
    if parts.spec.context < SHORTEST_CONTEXT:
        raise PassError(f"a context of {parts.spec.context} tokens is too short to check, and for any text")
    save_graph(write_graph(parts), path)
    difference = check_decoder(model, path, parts.spec)
    if difference > TOLERANCE:
        raise PassError(
            f"the decoder graph's logits differ from torch's by {difference:.2g}, more than the tolerance {TOLERANCE:g}"
        )
    return {"context": parts.spec.context, "max_difference": difference, "tolerance": TOLERANCE}


def check_decoder(model: PreTrainedModel, path: Path, spec: DecoderSpec) -> float:
    """The largest difference of the graph's logits from the model's: prompts in two pieces, then steps of all rows."""
    chance = np.random.default_rng(0)
    width = model.get_input_embeddings().num_embeddings
    texts = [chance.integers(0, width, min(length + DECODED, spec.context)) for length in LENGTHS]
    with torch.inference_mode():
        expected = [model(torch.from_numpy(text)[None]).logits[0].numpy() for text in texts]
    try:
        with contextlib.closing(GraphRunner(path, spec, EngineOptions())) as runner:
            return largest_difference(_logits(runner, texts), expected)
    except FettleError as error:
        raise PassError(f"ONNX Runtime does not run the decoder graph: {error.message}") from error


def _logits(runner: GraphRunner, texts: list[NDArray[np.int64]]) -> list[Floats]:
    """Of every position of every text, the last `DECODED` one token at a time, all texts together."""
    runner.allocate(len(texts), max(map(len, texts)))
    ids = [text.astype(np.int32) for text in texts]
    fed = np.array([len(text) - DECODED for text in texts], np.int32)
    found = []
    for slot, (text, length) in enumerate(zip(ids, fed, strict=True)):
        half = int(length) // 2
        parts = [(text[:half], 0), (text[half:length], half)]
        found.append([runner.feed(slot, part, start, len(part)) for part, start in parts])
    for step in range(DECODED):
        rows = runner.decode(np.array([text[length + step] for text, length in zip(ids, fed, strict=True)]), fed + step)
        for logits, row in zip(found, rows, strict=True):
            logits.append(row[None])
    return [np.concatenate(logits) for logits in found]
