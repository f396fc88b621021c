"""The ONNX int8 file that Infinity's `optimum` engine serves. Runs in the peer's own environment, not in ours.

    python export_int8.py MODEL_DIR OUT_DIR INSTRUCTIONS TASK

The route is the one that Optimum documents: export, then `ORTQuantizer`, dynamic, per channel, for the processor's
instructions (avx512_vnni, avx512 or avx2).
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig


def main(model: str, out: Path, instructions: str, task: str) -> None:
    # Optimum 1.24 was written for the exporter that torch no longer uses unless asked; the newer one wants onnxscript.
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    main_export(model, out, task=task, library_name="transformers")
    config = getattr(AutoQuantizationConfig, instructions)(is_static=False, per_channel=True)
    # Writes model_quantized.onnx; Infinity prefers a file with "quantize" in its name.
    ORTQuantizer.from_pretrained(out, file_name="model.onnx").quantize(config, save_dir=out)
    (out / "model.onnx").unlink()  # leaves no doubt about which file is served


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
