"""int8 whose answers do not depend on the batch: known ranges where they serve, else a scale for every token.

Dynamic int8 takes one activation scale for the whole call, padding and neighbours included. Here nothing that is
found at run time reaches across tokens, so that a row has the same answer in any company, bit for bit where the
float kernels around it have that property. What was measured, and what was not kept: benchmarks/LOG.md, "int8".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx
from pydantic import JsonValue

from fettle.errors import PassError
from fettle.manifest import TokenizerSpec
from fettle.rows import Rows
from optimize.export import save_graph
from optimize.fuse import MICROSOFT
from optimize.linear_layers import (
    GELU_FLOOR,
    STEPS,
    Linear,
    PerRow,
    Scheme,
    Static,
    by_source,
    equalised,
    find_linears,
    shared_weights,
    write_int8,
)
from optimize.quantize import weight_limit
from optimize.ranges import Observed, equalising_range, joined_error, observe
from optimize.rounding import LIMIT, Rounded, round_nearest, round_with_feedback

# A known range is cheaper than scales for every token, so it may lose this much more of the layers' output.
ALLOWED_LOSS = 2.0
# GELU outputs may grow to twice what calibration saw before a scale that counts from their floor saturates.
LARGEST_FLOORED = (STEPS - 1) * GELU_FLOOR / 2

# From fewer tokens no range is known: what they did not show would saturate.
TOKENS_FOR_RANGES = 1000
# With fewer calibration tokens for each input, error feedback fits these tokens and not the model's work.
TOKENS_PER_INPUT = 4


def quantize_rows_int8(
    path_in: Path,
    path_out: Path,
    rows: Rows | None = None,
    spec: TokenizerSpec | None = None,
    *,
    feedback: bool = True,
) -> dict[str, JsonValue]:
    """Quantize every linear layer so that no answer depends on who shares the batch.

    With calibration `rows` (and their `spec`), inputs no wider than what their layers give get a static range with
    equalised channels, unless that loses too much or too few tokens were seen; all others, and everything without
    rows, a scale for every token.

    Args:
        feedback: with rows, round weights with error feedback instead of to the nearest step: slower to build by a
            few seconds for each 10 million weights, no slower to run.

    Returns how many layers became int8, how many inputs are scaled which way, and how many layers stayed float.

    Raises:
        PassError: nothing could be quantized, or ONNX Runtime does not run the graph.
        DataError: there are rows to calibrate with, but none in them.
    """
    model = onnx.load(path_in)
    linears = per_token_layers(find_linears(model))
    if not linears:
        raise PassError("the graph has no linear layer with constant weights to quantize")
    limit = weight_limit()
    schemes: dict[str, Scheme] = {linear.source: PerRow() for linear in linears}
    weights = {linear.product.output[0]: round_nearest(linear.weight, limit) for linear in linears}
    if rows is not None and spec is not None:
        widths = {linear.source: linear.weight.shape[0] for linear in linears}
        seen = observe(model, widths, rows, spec, grams=feedback)
        calibrate(model, linears, schemes, weights, seen, limit)
    quantized = write_int8(model, linears, schemes, weights)
    save_graph(model, path_out)
    kinds = Counter("static" if isinstance(scheme, Static) else "per_row" for scheme in schemes.values())
    left = sum(node.op_type in ("MatMul", "Gemm") for node in model.graph.node)
    return {"quantized": quantized, "left_float": left, "inputs": dict(kinds), "reduced_range": limit != LIMIT}


def calibrate(
    model: onnx.ModelProto,
    linears: list[Linear],
    schemes: dict[str, Scheme],
    weights: dict[str, Rounded],
    seen: Iterable[tuple[str, Observed]],
    limit: int,
) -> None:
    """Replace schemes (by input) and weights (by the product's output) by what serves the inputs that were seen better.

    Weights are rounded with error feedback where a gram was observed.
    """
    groups = by_source(linears)
    shared = shared_weights(linears)
    gelus = {node.output[0] for node in model.graph.node if _is_exact_gelu(node)}
    for name, observed in seen:
        group = groups[name]
        alone = shared.isdisjoint(linear.name for linear in group)
        schemes[name] = _scheme(observed, group, alone=alone, gelu=name in gelus)
        for linear in group if alone else []:
            weights[linear.product.output[0]] = _rounded(linear, schemes[name], observed, limit)


def per_token_layers(linears: list[Linear]) -> list[Linear]:
    """Without the layers that run once a text, on its pooled state: as float they cost next to nothing (exporters write
    these as Gemm). All of them where there are no others."""
    return [linear for linear in linears if linear.product.op_type == "MatMul"] or linears


def _scheme(seen: Observed, group: list[Linear], *, alone: bool, gelu: bool) -> Scheme:
    """`alone`: no other group uses these weights, so that they may be changed to fit this input."""
    per_row = PerRow(GELU_FLOOR if gelu and seen.peak < LARGEST_FLOORED else 0.0)
    inputs = group[0].weight.shape[0]
    # A wide input's scales cost less than to equalise it: they are applied to its narrow outputs.
    wide = inputs > sum(linear.weight.shape[1] for linear in group)
    if wide or not alone or seen.tokens < TOKENS_FOR_RANGES:
        return per_row
    static = equalising_range(seen.sample, group)
    worst = ALLOWED_LOSS * joined_error(seen.sample, group, per_row)
    return static if joined_error(seen.sample, group, static) <= worst else per_row


def _rounded(linear: Linear, scheme: Scheme, seen: Observed, limit: int) -> Rounded:
    weight = equalised(linear.weight, scheme)
    if seen.gram is None or seen.tokens < TOKENS_PER_INPUT * len(weight):
        return round_nearest(weight, limit)
    factors = scheme.factors if isinstance(scheme, Static) else None
    gram = seen.gram if factors is None else seen.gram / factors[:, None] / factors
    return round_with_feedback(weight, gram, limit)


def _is_exact_gelu(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gelu" and (node.domain == MICROSOFT or not node.attribute)
