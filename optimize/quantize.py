"""Dynamic int8: weights as int8 per output channel, activations as uint8 with a scale found at run time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from pydantic import JsonValue

from fettle.errors import PassError
from optimize.export import fits_one_file, quiet
from optimize.rounding import LIMIT, REDUCED_LIMIT

KINDS = ["MatMul", "Gemm"]
# A two-operand int8 product needs 7-bit weights where the processor adds pairs of products in 16 bits.
VNNI_FLAGS = {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"}
CPU_INFO = Path("/proc/cpuinfo")


def quantize_dynamic_int8(path_in: Path, path_out: Path, *, per_channel: bool = True) -> dict[str, JsonValue]:
    """Quantize every linear layer's weights; embeddings, norms and attention itself stay in float32.

    Returns how many linear layers became int8, how many stayed, and whether the weights were reduced to 7 bits.

    Raises:
        PassError: nothing could be quantized, or the quantizer stopped.
    """
    model = onnx.load(path_in)
    # The exporter's shapes name symbols that the quantizer's shape inference refuses to merge with its own.
    del model.graph.value_info[:]
    reduced = saturates()
    try:
        with quiet():
            quantize_dynamic(
                model,
                path_out,
                op_types_to_quantize=KINDS,
                per_channel=per_channel,
                reduce_range=reduced,
                weight_type=QuantType.QInt8,
                use_external_data_format=not fits_one_file(model),
                # Shape inference does not see through ONNX Runtime's own operators, which all give floats here.
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
    except Exception as error:
        # The quantizer raises bare exceptions of many kinds.
        raise PassError(f"ONNX Runtime's quantizer stopped: {(str(error) or type(error).__name__)[:200]}") from error
    counts = Counter(node.op_type for node in onnx.load(path_out, load_external_data=False).graph.node)
    if not counts["MatMulInteger"]:
        raise PassError("the graph has no linear layer with constant weights to quantize")
    return {
        "quantized": counts["MatMulInteger"],
        "left_float": sum(counts[kind] for kind in KINDS),
        "reduced_range": reduced,
    }


def saturates(flags: set[str] | None = None) -> bool:
    """Whether u8 x s8 products overflow 16 bits on this processor (AVX2 and AVX-512 without VNNI).

    Unknown processors count as safe only if they are not x86, whose kernels have 32-bit sums.
    """
    flags = cpu_flags() if flags is None else flags
    return bool(flags) and not flags & VNNI_FLAGS


def weight_limit() -> int:
    """The largest int8 weight that this processor's products are safe with."""
    return REDUCED_LIMIT if saturates() else LIMIT


def cpu_flags() -> set[str]:
    if not CPU_INFO.exists():
        return set()
    lines = (line for line in CPU_INFO.read_text().splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())
