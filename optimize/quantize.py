"""Dynamic int8: weights as int8 per output channel, activations as uint8 with a scale found at run time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from pydantic import JsonValue

from optimize.export import quiet


def quantize_dynamic_int8(path_in: Path, path_out: Path, *, per_channel: bool = True) -> dict[str, JsonValue]:
    model = onnx.load(path_in)
    # The exporter's shapes name symbols that the quantizer's shape inference refuses to merge with its own.
    del model.graph.value_info[:]
    with quiet():
        quantize_dynamic(
            model,
            path_out,
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
    counts = {}
    for node in onnx.load(path_out).graph.node:
        if node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul"):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
