"""What flows through a decoder's graph on texts: each runs alone, from its first token to its last, in one call."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from fettle.errors import DataError
from fettle.rows import Rows
from optimize.linear_layers import Linear
from optimize.ranges import Feed, Observed, observe_feeds

PAST = "past_"


def observe_decoder(
    model: onnx.ModelProto, linears: list[Linear], texts: Rows, *, grams: bool
) -> Iterator[tuple[str, Observed]]:
    """What was seen of the inputs of these layers, one after the other.

    The first token of each text is in the sample: models of this kind give it values that no other has.

    Raises:
        DataError: there are no texts.
        PassError: ONNX Runtime does not run the graph.
    """
    if not len(texts):
        raise DataError("calibration needs at least one text; give a data file with texts")
    widths = {linear.source: linear.weight.shape[0] for linear in linears}
    yield from observe_feeds(model, widths, lambda: text_feeds(model, texts), grams=grams, first=True)


def text_feeds(model: onnx.ModelProto, texts: Rows) -> Iterator[Feed]:
    """Inputs of a decoder graph (`workers/onnx_decoder.py`), one text at a time; logits are wanted of every token."""
    buffers = {item.name: _sizes(item) for item in model.graph.input if item.name.startswith(PAST)}
    for ids in np.split(texts.ids, np.cumsum(texts.lengths)[:-1]):
        tokens = len(ids)
        feed: Feed = {
            "input_ids": ids[None].astype(np.int64),
            "seqlens_k": np.array([tokens - 1], np.int32),
            "total_sequence_length": np.array(tokens, np.int32),
            "logit_rows": np.arange(tokens),
        }
        yield feed | {name: np.zeros((1, heads, tokens, size), np.float32) for name, (heads, size) in buffers.items()}


def _sizes(buffer: onnx.ValueInfoProto) -> tuple[int, int]:
    dims = buffer.type.tensor_type.shape.dim
    return dims[1].dim_value, dims[3].dim_value
