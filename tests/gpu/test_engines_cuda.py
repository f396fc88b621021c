"""The real engines on CUDA give what they give on CPU."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from fettle.manifest import Precision, Runtime
from optimize.checkpoint import save_checkpoint
from optimize.export import export_onnx
from optimize.fuse import fuse
from optimize.load import load_reference
from tests.unit import tiny_models
from tests.unit.test_architectures import manifest_of, sample_rows
from workers.engine import EngineOptions
from workers.onnx_encoder import OnnxEncoder
from workers.torch_encoder import TorchEncoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
# TF32 products and other orders of summation.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return load_reference(str(tiny_models.classifier(tmp_path_factory.mktemp("source") / "m")))


def on_both_devices(kind, directory, manifest, rows):
    values = []
    for device in ("cpu", "cuda"):
        engine = kind(directory, manifest, EngineOptions(device=device))
        engine.warm_up()
        values.append(engine.run(rows).values)
        engine.close()
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_engine(reference, tmp_path, dtype):
    precision = {
        torch.float32: Precision.FP32, torch.float16: Precision.FP16, torch.bfloat16: Precision.BF16
    }[dtype]  # fmt: skip
    save_checkpoint(reference, tmp_path, dtype)
    rows = sample_rows(reference)
    cpu, cuda = on_both_devices(TorchEncoder, tmp_path, manifest_of(reference, Runtime.TORCH, precision), rows)
    tolerance = TOLERANCE if dtype is torch.float32 else 0.1
    np.testing.assert_allclose(cuda, cpu, atol=tolerance * np.abs(cpu).max())


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime has no CUDA provider",
)
@pytest.mark.parametrize("fused", [False, True])
def test_onnx_engine(reference, tmp_path, fused):
    rows = sample_rows(reference)
    target = tmp_path / "model.onnx"
    export_onnx(reference, tmp_path / "plain.onnx" if fused else target, rows)
    if fused:
        fuse(tmp_path / "plain.onnx", target, rows, reference.tokenizer)
    cpu, cuda = on_both_devices(OnnxEncoder, tmp_path, manifest_of(reference, Runtime.ONNX, Precision.FP32), rows)
    np.testing.assert_allclose(cuda, cpu, atol=TOLERANCE * np.abs(cpu).max())
