"""The reference as an ONNX graph with dynamic batch and length, checked against torch on the user's own texts."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from pydantic import JsonValue
from torch import nn

from fettle.errors import PassError, first_line
from fettle.manifest import TokenizerSpec
from fettle.rows import Rows
from optimize.load import Reference
from workers.onnx_encoder import session_options

# From 23 on, ONNX has attention as one operator, and the exporter uses it.
OPSET = 23
TOLERANCE = 1e-4
Arrays = dict[str, NDArray[np.int64]]
Floats = NDArray[np.float32]


def export_onnx(reference: Reference, path: Path, sample: Rows) -> dict[str, JsonValue]:
    """Write `path`, one file unless it exceeds 2 GB.

    Inputs are int64 [batch, length]: input_ids, attention_mask, and token_type_ids where the model reads them. The
    output `values` is float32 [batch, width].

    Raises:
        PassError: the exporter failed, or the graph's answers on `sample` differ from torch's by more than
            `TOLERANCE` (absolute, or relative to the largest value where that exceeds 1).
    """
    try:
        with quiet():
            trace(reference.model, reference.tokenizer, ["values"], path)
    except Exception as error:
        # The exporter raises whatever the model's code happens to raise under tracing.
        raise PassError(f"torch.onnx.export failed on {reference.source.architecture}: {first_line(error)}") from error
    onnx.checker.check_model(str(path))
    difference = check_against_torch(lambda *inputs: [reference.model(*inputs)], reference.tokenizer, path, sample)
    return {"opset": OPSET, "max_difference": difference, "tolerance": TOLERANCE}


def trace(model: nn.Module, spec: TokenizerSpec, outputs: list[str], path: Path) -> None:
    """Write the graph of a module that reads int64 [rows, length] arrays. Raises whatever the exporter raises."""
    names = input_names(spec)
    # Sizes of 0 and 1 would be baked into the graph; 3 and 7 stand for any.
    ids = torch.full((3, 7), min(5, spec.vocabulary - 1))
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(names)]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.onnx.export(
        model,
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=names,
        output_names=outputs,
        dynamic_shapes=dict.fromkeys(names, axes),
        verbose=False,
    )
    if program is None:
        raise PassError("torch.onnx.export returned nothing")
    program.save(str(path))
    _repeat_rotary(path)


def _repeat_rotary(path: Path) -> None:
    """Give every row its own rotary angles.

    The operator wants [batch, length, size / 2]; the exporter leaves the [1, length, size / 2] of the model's code,
    which torch broadcasts and ONNX Runtime refuses.
    """
    model = onnx.load(path)
    rotary = [node for node in model.graph.node if node.op_type == "RotaryEmbedding" and len(node.input) == 3]
    if not rotary:
        return
    ones = numpy_helper.from_array(np.ones(2, np.int64), "rotary_ones")
    model.graph.initializer.append(ones)
    added = [
        helper.make_node("Shape", ["input_ids"], ["rotary_batch"], start=0, end=1),
        helper.make_node("Concat", ["rotary_batch", "rotary_ones"], ["rotary_shape"], axis=0),
    ]
    nodes = []
    for node in model.graph.node:
        if node in rotary:
            for place in (1, 2):
                wide = f"{node.output[0]}_angles_{place}"
                nodes.append(helper.make_node("Expand", [node.input[place], "rotary_shape"], [wide]))
                node.input[place] = wide
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(added + nodes)
    save_graph(model, path)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """One file; protobuf allows 2 GB, and what is larger keeps its weights in a second file beside it."""
    if fits_one_file(model):
        onnx.save(model, path)
    else:
        # onnx appends to a data file that is there already.
        weights = path.with_name(f"{path.name}.data")
        weights.unlink(missing_ok=True)
        onnx.save(model, path, save_as_external_data=True, location=weights.name)
        # onnx lets nobody but the owner read it.
        weights.chmod(path.stat().st_mode)


def fits_one_file(model: onnx.ModelProto) -> bool:
    # protobuf cannot tell the size of what it cannot write, so the weights are counted by themselves first.
    weights = sum(len(item.raw_data) for item in model.graph.initializer)
    return weights < onnx.checker.MAXIMUM_PROTOBUF and model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF


def input_names(spec: TokenizerSpec) -> list[str]:
    return ["input_ids", "attention_mask"] + (["token_type_ids"] if spec.segments else [])


def check_batches(sample: Rows, spec: TokenizerSpec) -> list[Arrays]:
    """Graph inputs in the shapes that go wrong most easily: one row, two tokens, unequal lengths, everything."""
    starts = np.concatenate([[0], np.cumsum(sample.lengths)])
    one = _cut(sample, starts, 0, 1)
    first = Rows(one.ids[:2], np.array([min(2, one.tokens)], np.int32))
    parts = [one, first, _cut(sample, starts, 0, min(3, len(sample))), sample]
    return [dict(zip(input_names(spec), part.padded(spec.pad_id), strict=False)) for part in parts]


def _cut(rows: Rows, starts: NDArray[np.int64], first: int, last: int) -> Rows:
    inside = slice(starts[first], starts[last])
    types = None if rows.type_ids is None else rows.type_ids[inside]
    return Rows(rows.ids[inside], rows.lengths[first:last], types)


def run_graph(path: Path, batches: list[Arrays]) -> list[Floats]:
    """Every answer [rows, width] of the graph, batch by batch. Hidden states at the cuts between stages are none."""
    session = ort.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    answers = [item.name for item in session.get_outputs() if len(item.shape) == 2]
    return [values for batch in batches for values in session.run(answers, batch)]


def largest_difference(values: list[Floats], expected: list[Floats]) -> float:
    """Largest absolute difference, in units of the largest expected value where that exceeds 1. NaN is infinite."""
    worst = 0.0
    for ours, theirs in zip(values, expected, strict=True):
        difference = float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    return worst


def check_against_torch(
    model: Callable[..., Sequence[torch.Tensor]], spec: TokenizerSpec, path: Path, sample: Rows
) -> float:
    """The largest difference of the graph's answers from those of `model`, which gives them in the same order.

    Raises:
        PassError: ONNX Runtime does not run the graph, or the difference exceeds `TOLERANCE`.
    """
    batches = check_batches(sample, spec)
    with torch.inference_mode():
        expected = [
            values.numpy()
            for batch in batches
            for values in model(*(torch.from_numpy(array) for array in batch.values()))
        ]
    try:
        difference = largest_difference(run_graph(path, batches), expected)
    except Exception as error:
        # ONNX Runtime's errors have no class in common.
        raise PassError(f"ONNX Runtime does not run the exported graph: {first_line(error)}") from error
    if difference > TOLERANCE:
        raise PassError(
            f"the exported graph's values differ from torch's by {difference:.2g}, "
            f"more than the tolerance {TOLERANCE:g}"
        )
    return difference


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's and the quantizer's chatter from the user: warnings, logging and prints."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
