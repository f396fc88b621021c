"""Static int8: every activation's range is known beforehand, and the layers that bear it worst stay in float32.

The fastest of the int8 schemes to run is the one in `optimize.quantize_rows`, which uses static ranges only where they
serve; this one is the plain scheme that other tools know, for comparison and for accelerators that need it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from pydantic import JsonValue

from fettle.errors import PassError, UsageError
from fettle.manifest import TokenizerSpec
from fettle.rows import Rows
from optimize.export import save_graph
from optimize.linear_layers import Linear, Static, by_source, equalised, find_linears, shared_weights, write_int8
from optimize.quantize import weight_limit
from optimize.ranges import Method, equalising_range, observe, outputs_of, static_range
from optimize.rounding import Floats, Rounded, round_nearest

SENSITIVITY_ROWS = 32


def quantize_static_int8(
    path_in: Path,
    path_out: Path,
    rows: Rows,
    spec: TokenizerSpec,
    *,
    method: Method = "error",
    equalise: bool = True,
    left_share: float = 0.1,
) -> dict[str, JsonValue]:
    """Quantize every linear layer with ranges from the calibration rows, but for the most sensitive inputs.

    Args:
        method: how a range follows from the values seen: their extremes, their 99.99th percentile, or what costs the
            layers' output least. Equalised inputs are always ranged by that cost.
        equalise: divide each input's channels by factors that move their differences into the weights.
        left_share: share in [0, 1) of the inputs, rounded up, whose layers stay in float32: those that alone change
            the graph's answers on the first calibration rows most. 0 measures nothing.

    Returns how many layers became int8 and stayed float, and each measured input's mean squared change of the answers.

    Raises:
        UsageError: `left_share` is not in [0, 1).
        PassError: nothing could be quantized, or ONNX Runtime does not run the graph.
        DataError: there are no calibration rows.
    """
    if not 0 <= left_share < 1:
        raise UsageError(f"left_share is {left_share:g}; it is a share from 0 to below 1", param="left_share")
    model = onnx.load(path_in)
    linears = find_linears(model)
    groups = by_source(linears)
    if not groups:
        raise PassError("the graph has no linear layer with constant weights to quantize")
    shared = shared_weights(linears)
    widths = {name: group[0].weight.shape[0] for name, group in groups.items()}
    schemes: dict[str, Static] = {}
    for name, seen in observe(model, widths, rows, spec, grams=False):
        # Weights that other inputs share cannot be changed to fit this one.
        alone = shared.isdisjoint(linear.name for linear in groups[name])
        if equalise and alone:
            schemes[name] = equalising_range(seen.sample, groups[name])
        else:
            schemes[name] = static_range(seen.sample, groups[name], method)
    weights = _rounded(linears, schemes)
    changes = _changes(model, linears, schemes, weights, rows, spec) if left_share else {}
    worst = sorted(changes, key=lambda name: changes[name], reverse=True)[: math.ceil(left_share * len(changes))]
    kept = {name: scheme for name, scheme in schemes.items() if name not in worst}
    if not kept:
        raise PassError("all layers would stay in float32; give a smaller left_share")
    quantized = write_int8(model, linears, dict(kept), weights)
    save_graph(model, path_out)
    left = sum(node.op_type in ("MatMul", "Gemm") for node in model.graph.node)
    return {"quantized": quantized, "left_float": left, "left_inputs": list(worst), "sensitivity": dict(changes)}


def _rounded(linears: list[Linear], schemes: dict[str, Static]) -> dict[str, Rounded]:
    limit = weight_limit()
    return {
        linear.product.output[0]: round_nearest(equalised(linear.weight, schemes[linear.source]), limit)
        for linear in linears
    }


def _changes(
    model: onnx.ModelProto,
    linears: list[Linear],
    schemes: dict[str, Static],
    weights: dict[str, Rounded],
    rows: Rows,
    spec: TokenizerSpec,
) -> dict[str, float]:
    """How much the answers change when the layers of one input alone are int8: mean squares, by input."""
    count = min(SENSITIVITY_ROWS, len(rows))
    tokens = int(rows.lengths[:count].sum())
    some = Rows(rows.ids[:tokens], rows.lengths[:count], None if rows.type_ids is None else rows.type_ids[:tokens])
    exact = outputs_of(model, some, spec)
    return {
        name: _change(model, linears, {name: scheme}, weights, exact, some, spec) for name, scheme in schemes.items()
    }


def _change(
    model: onnx.ModelProto,
    linears: list[Linear],
    schemes: dict[str, Static],
    weights: dict[str, Rounded],
    exact: Floats,
    rows: Rows,
    spec: TokenizerSpec,
) -> float:
    trial = onnx.ModelProto()
    trial.CopyFrom(model)
    write_int8(trial, linears, dict(schemes), weights)
    return float(np.mean((outputs_of(trial, rows, spec) - exact) ** 2))
