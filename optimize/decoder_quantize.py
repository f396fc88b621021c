"""Decoder graphs in 8 and in 4 bits, so that no generation depends on the others in its batch.

- `quantize_decoder_int8`: u8 x s8 products with 32-bit sums, which are exact and therefore the same in every batch.
  Best from a few rows on, and for prompts, where arithmetic is what costs.
- `quantize_decoder_int4`: weights of 4 bits with a scale for every block of inputs, activations to int8 by blocks of
  each row inside the operator. Best for one row, where reading the weights is what costs.

The head and the embedding table, which are often one matrix, are kept in 8 bits once. What was measured, and what was
not kept: benchmarks/LOG.md, "generation".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from pydantic import JsonValue

from fettle.errors import PassError, UsageError
from fettle.rows import Rows
from optimize.block_rounding import (
    Blocks,
    packed,
    round_blocks,
    round_blocks_fitted,
    round_blocks_half_quadratic,
    round_blocks_to_8_bits,
    round_blocks_with_feedback,
)
from optimize.decoder_observe import observe_decoder
from optimize.export import save_graph
from optimize.fuse import MICROSOFT, Graph, drop_unused, import_domain
from optimize.linear_layers import Linear, PerRow, Scheme, Static, by_source, find_linears, write_int8
from optimize.quantize import weight_limit
from optimize.quantize_rows import TOKENS_PER_INPUT, calibrate
from optimize.quantize_weights import INT8_SUMS, tables_to_int8
from optimize.ranges import Observed
from optimize.rounding import LIMIT, round_nearest

Notes: TypeAlias = dict[str, JsonValue]
Rounding = Literal["nearest", "fitted", "half-quadratic", "feedback"]

BLOCK = 64
BLOCKS = (16, 32, 64, 128, 256)
# Of a head in 8 bits: the largest that divides the width of a table, so that it can be both.
HEAD_BLOCKS = (128, 64, 32, 16)
MIDDLE = 128


def quantize_decoder_int8(path_in: Path, path_out: Path, texts: Rows | None = None, *, feedback: bool = True) -> Notes:
    """Quantize every linear layer and the embedding table.

    Args:
        texts: calibration, as token ids. With it inputs get static ranges where these lose little (without, each token
            has a scale of its own), and weights are rounded with error feedback where the tokens suffice.
        feedback: False rounds to the nearest step all the same.

    Returns how many layers became int8, how many inputs are scaled which way, and whether the head is the table.

    Raises:
        PassError: there is nothing to quantize, or ONNX Runtime does not run the graph.
        DataError: there are texts to calibrate with, but none in them.
    """
    model, linears = _loaded(path_in)
    limit = weight_limit()
    schemes: dict[str, Scheme] = {linear.source: PerRow() for linear in linears}
    weights = {linear.product.output[0]: round_nearest(linear.weight, limit) for linear in linears}
    table = _table(model)
    if texts is not None:
        # A head that is the table stays what the table is.
        own = [linear for linear in linears if linear.name != table]
        calibrate(model, own, schemes, weights, observe_decoder(model, own, texts, grams=feedback), limit)
        _fold_factors(model, schemes)
    quantized = write_int8(model, linears, schemes, weights, _same_rows(model))
    written, _ = tables_to_int8(model, 1, limit)
    tied = table in written and _share_transposed(model, written[table][0])
    drop_unused(model)
    save_graph(model, path_out)
    kinds = Counter("static" if isinstance(scheme, Static) else "per_row" for scheme in schemes.values())
    return {"quantized": quantized, "inputs": dict(kinds), "tied": tied, "reduced_range": limit != LIMIT}


def quantize_decoder_int4(
    path_in: Path,
    path_out: Path,
    texts: Rows | None = None,
    *,
    block: int = BLOCK,
    rounding: Rounding | None = None,
    head_bits: Literal[4, 8] = 8,
) -> Notes:
    """Quantize the weights of every linear layer to 4 bits, and the embedding table to 8.

    Args:
        texts: calibration, as token ids.
        block: inputs that share a scale, one of `BLOCKS`: small ones lose less, large ones are read faster.
        rounding: `nearest` and `half-quadratic` (HQQ) know the weights alone; `fitted` chooses scales, by what the
            inputs in `texts` are like if there are any; `feedback` (GPTQ) rounds on these, passing errors on. None is
            the last with texts, and `fitted` without.
        head_bits: of the layer that gives the logits. Of 8 it shares its weights with the table, where these are one.

    Returns how many layers were rewritten, how they were rounded, and whether the head is the table.

    Raises:
        UsageError: an unknown block size, or feedback without texts.
        PassError: there is nothing to quantize, or ONNX Runtime does not run the graph.
        DataError: there are texts to calibrate with, but none in them.
    """
    if block not in BLOCKS:
        raise UsageError(f"a block is of {', '.join(map(str, BLOCKS))} weights, not of {block}", param="block")
    if rounding == "feedback" and texts is None:
        raise UsageError("rounding with error feedback needs texts to calibrate with", param="rounding")
    method: Rounding = rounding or ("fitted" if texts is None else "feedback")
    model, linears = _loaded(path_in)
    head = linears[-1] if head_bits == 8 else None
    body = [linear for linear in linears if linear is not head]
    seen = None
    if texts is not None and method in ("fitted", "feedback"):
        seen = observe_decoder(model, body, texts, grams=True)
    blocks = _rounded(body, seen, block, method)
    table = _table(model)
    tied = False
    if head is not None:
        size = next((size for size in HEAD_BLOCKS if len(head.weight) % size == 0), HEAD_BLOCKS[0])
        blocks[head.product.output[0]] = round_blocks_to_8_bits(head.weight, size)
        tied = head.name == table and len(head.weight) % size == 0
    _write_blocks(model, linears, blocks)
    if tied and head is not None:
        _look_up_in_blocks(model, table, head.product.output[0])
    tables_to_int8(model, 1)
    drop_unused(model)
    save_graph(model, path_out)
    return {"quantized": len(blocks), "rounding": method, "block": block, "head_bits": head_bits, "tied": tied}


def _loaded(path: Path) -> tuple[onnx.ModelProto, list[Linear]]:
    model = onnx.load(path)
    linears = find_linears(model)
    if not linears:
        raise PassError("the graph has no linear layer with constant weights to quantize")
    return model, linears


def _table(model: onnx.ModelProto) -> str:
    """The embedding table's name."""
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] == "input_ids":
            return str(node.input[0])
    raise PassError("the graph looks nothing up by `input_ids`, so it is no decoder")


def _same_rows(model: onnx.ModelProto) -> dict[str, str]:
    """By tensor, what its rows are: those of all tokens, or those whose logits are wanted."""
    wanted = {"logit_rows"}
    rows = {}
    for node in model.graph.node:
        kind = "wanted" if wanted.intersection(node.input) else "all"
        if kind == "wanted":
            wanted.update(node.output)
        rows.update(dict.fromkeys(node.output, kind))
    return rows


# int8.


def _fold_factors(model: onnx.ModelProto, schemes: dict[str, Scheme]) -> None:
    """Factors of a norm's channels become part of its gain, which costs nothing at run time."""
    graph = Graph(model)
    for name, scheme in schemes.items():
        norm = graph.made_by(name, "RMSNormalization")
        if norm is None or not isinstance(scheme, Static) or scheme.factors is None:
            continue
        if len(graph.readers[norm.input[1]]) > 1:
            continue
        gain = graph.weights[norm.input[1]]
        gain.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(gain) / scheme.factors, gain.name))
        schemes[name] = Static(scheme.low, scheme.high)


def _share_transposed(model: onnx.ModelProto, codes: str) -> bool:
    """Let a matrix that is the table's codes the other way round be made from them when the graph is loaded."""
    constants = {item.name: item for item in model.graph.initializer}
    table = numpy_helper.to_array(constants[codes])
    for item in model.graph.initializer:
        if item.data_type != TensorProto.INT8 or list(item.dims) != list(table.shape[::-1]):
            continue
        if not np.array_equal(numpy_helper.to_array(item), table.T):
            continue
        for node in model.graph.node:
            if item.name in node.input:
                node.input[list(node.input).index(item.name)] = f"{codes}_transposed"
        model.graph.node.insert(0, helper.make_node("Transpose", [codes], [f"{codes}_transposed"], perm=[1, 0]))
        return True
    return False


# Blocks.


def _rounded(
    linears: list[Linear], seen: Iterator[tuple[str, Observed]] | None, block: int, method: Rounding
) -> dict[str, Blocks]:
    """By the product's output."""
    groups = by_source(linears)
    inputs: Iterable[tuple[str, Observed | None]] = seen or ((name, None) for name in groups)
    return {
        linear.product.output[0]: _rounded_layer(linear, observed, block, method)
        for name, observed in inputs
        for linear in groups[name]
    }


def _rounded_layer(linear: Linear, seen: Observed | None, block: int, method: Rounding) -> Blocks:
    match method:
        case "nearest":
            return round_blocks(linear.weight, block)
        case "half-quadratic":
            return round_blocks_half_quadratic(linear.weight, block)
    gram = seen.gram if seen is not None else None
    if seen is None or gram is None:
        return round_blocks_fitted(linear.weight, block)
    if method == "feedback" and seen.tokens >= TOKENS_PER_INPUT * len(gram):
        return round_blocks_with_feedback(linear.weight, gram, block)
    return round_blocks_fitted(linear.weight, block, np.diag(gram))


def _write_blocks(model: onnx.ModelProto, linears: list[Linear], blocks: dict[str, Blocks]) -> None:
    """Rewrite in place; a layer's constants are called as its product is."""
    for linear in linears:
        output = linear.product.output[0]
        chosen = blocks[output]
        codes, scales, zeros = packed(chosen)
        constants: dict[str, NDArray[Any]] = {"codes": codes, "scales": scales}
        if zeros is not None:
            constants["zeros"] = zeros
        names = [f"{output}.{part}" for part in constants]
        model.graph.initializer.extend(
            numpy_helper.from_array(array, name) for name, array in zip(names, constants.values(), strict=True)
        )
        inputs, outputs = linear.weight.shape
        written = helper.make_node(
            "MatMulNBits",
            [linear.source, *names],
            [output],
            name=linear.product.name,
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=chosen.bits,
            block_size=chosen.size,
            accuracy_level=INT8_SUMS,
        )
        linear.product.CopyFrom(written)
    import_domain(model, MICROSOFT)


def _look_up_in_blocks(model: onnx.ModelProto, table: str, head: str) -> None:
    """Embeddings from the head's weights, which are [entries, blocks, size] codes around `MIDDLE`."""
    constants = {item.name: item for item in model.graph.initializer}
    entries, count, _ = constants[f"{head}.codes"].dims
    added = {
        "table.scales.shape": np.array([entries, count, 1]),
        "table.joined": np.array([0, 0, -1]),
        "table.middle": np.array(MIDDLE, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in added.items())
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gather" or node.input[0] != table:
            nodes.append(node)
            continue
        output, ids = node.output[0], node.input[1]
        nodes += [
            helper.make_node("Gather", [f"{head}.codes", ids], [f"{output}.codes"]),
            helper.make_node("Cast", [f"{output}.codes"], [f"{output}.whole"], to=TensorProto.FLOAT),
            helper.make_node("Sub", [f"{output}.whole", "table.middle"], [f"{output}.steps"]),
            helper.make_node("Reshape", [f"{head}.scales", "table.scales.shape"], ["table.scales"]),
            helper.make_node("Gather", ["table.scales", ids], [f"{output}.scales"]),
            helper.make_node("Mul", [f"{output}.steps", f"{output}.scales"], [f"{output}.blocks"]),
            helper.make_node("Reshape", [f"{output}.blocks", "table.joined"], [output]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
