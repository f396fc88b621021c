"""Weights alone in 8 or 4 bits by blocks, and embedding tables in 8: smaller files, the float32 model's work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import JsonValue

from fettle.errors import PassError
from optimize.export import quiet, save_graph
from optimize.fuse import drop_unused
from optimize.rounding import LIMIT, round_nearest

# Activations go to int8 by blocks of each row inside the operator, so that no answer depends on the batch.
INT8_SUMS = 4
SMALLEST_TABLE = 1024


def quantize_weights(
    path_in: Path, path_out: Path, *, bits: Literal[4, 8] = 8, block: int = 32, accuracy_level: int = INT8_SUMS
) -> dict[str, JsonValue]:
    """Keep each MatMul's weights in `bits` bits, with a scale for every `block` inputs (round to nearest).

    Returns how many layers were rewritten and how many stayed (Gemm has no such form).

    Raises:
        PassError: nothing could be quantized, or the quantizer stopped.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(path_in)
    del model.graph.value_info[:]
    try:
        with quiet():
            quantizer = MatMulNBitsQuantizer(
                model, bits=bits, block_size=block, is_symmetric=True, accuracy_level=accuracy_level
            )
            quantizer.process()
    except Exception as error:
        # The quantizer raises bare exceptions of many kinds.
        raise PassError(f"ONNX Runtime's quantizer stopped: {(str(error) or type(error).__name__)[:200]}") from error
    written = quantizer.model.model
    counts = Counter(node.op_type for node in written.graph.node)
    if not counts["MatMulNBits"]:
        raise PassError("the graph has no MatMul with constant weights to quantize")
    save_graph(written, path_out)
    return {"quantized": counts["MatMulNBits"], "left_float": counts["MatMul"] + counts["Gemm"]}


def quantize_embeddings_int8(path_in: Path, path_out: Path, *, smallest: int = SMALLEST_TABLE) -> dict[str, JsonValue]:
    """Keep embedding tables of at least `smallest` entries as int8 with a scale for each entry.

    Returns how many tables were rewritten, 0 if there are none, and the bytes saved.
    """
    model = onnx.load(path_in)
    written, saved = tables_to_int8(model, smallest)
    drop_unused(model)
    save_graph(model, path_out)
    return {"tables": len(written), "bytes_saved": saved}


def tables_to_int8(
    model: onnx.ModelProto, smallest: int = SMALLEST_TABLE, limit: int = LIMIT
) -> tuple[dict[str, tuple[str, str]], int]:
    """The same in place: the names of each table's codes and scales, and the bytes saved."""
    tables = {item.name: item for item in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    saved = 0
    written: dict[str, tuple[str, str]] = {}
    for node in model.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_table(node, table, smallest):
            nodes.append(node)
            continue
        if table.name not in written:
            written[table.name], bytes_saved = _halves(model, table, limit)
            saved += bytes_saved
        nodes += _looked_up(node, *written[table.name])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return written, saved


def _is_table(node: onnx.NodeProto, table: onnx.TensorProto, smallest: int) -> bool:
    rows_first = all(item.name != "axis" or item.i == 0 for item in node.attribute)
    return rows_first and table.data_type == TensorProto.FLOAT and len(table.dims) == 2 and table.dims[0] >= smallest


def _halves(model: onnx.ModelProto, table: onnx.TensorProto, limit: int) -> tuple[tuple[str, str], int]:
    values = numpy_helper.to_array(table)
    rounded = round_nearest(values.T, limit)
    codes = numpy_helper.from_array(np.ascontiguousarray(rounded.codes.T), f"{table.name}_int8")
    scales = numpy_helper.from_array(rounded.scales[:, None], f"{table.name}_scales")
    model.graph.initializer.extend([codes, scales])
    return (codes.name, scales.name), values.nbytes - rounded.codes.nbytes - rounded.scales.nbytes


def _looked_up(node: onnx.NodeProto, codes: str, scales: str) -> list[onnx.NodeProto]:
    output, entries = node.output[0], node.input[1]
    return [
        helper.make_node("Gather", [codes, entries], [f"{output}_codes"]),
        helper.make_node("Cast", [f"{output}_codes"], [f"{output}_whole"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [scales, entries], [f"{output}_scale"]),
        helper.make_node("Mul", [f"{output}_whole", f"{output}_scale"], [output]),
    ]
