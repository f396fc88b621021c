"""What both real engines promise beyond right values: shapes, errors, closing, and the one that imports no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from fettle.errors import EngineError, FamilyError, UsageError
from fettle.manifest import Precision, Runtime
from fettle.rows import Row, Rows
from optimize.checkpoint import save_checkpoint
from optimize.export import export_onnx
from optimize.load import load_reference
from optimize.quantize import quantize_dynamic_int8, saturates
from tests.unit import tiny_models
from tests.unit.test_architectures import manifest_of, sample_rows
from workers.engine import EngineOptions
from workers.onnx_encoder import CALL_TOKENS, OnnxEncoder
from workers.torch_encoder import TorchEncoder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return load_reference(str(tiny_models.classifier(tmp_path_factory.mktemp("source") / "m")))


@pytest.fixture(scope="module")
def graph_directory(reference, tmp_path_factory):
    directory = tmp_path_factory.mktemp("graph")
    export_onnx(reference, directory / "model.onnx", sample_rows(reference))
    return directory


@pytest.fixture(scope="module")
def torch_directory(reference, tmp_path_factory):
    directory = tmp_path_factory.mktemp("torch")
    save_checkpoint(reference, directory, torch.float32)
    return directory


@pytest.fixture(params=["torch", "onnx"])
def engine(request, reference):
    directory = request.getfixturevalue("torch_directory" if request.param == "torch" else "graph_directory")
    kind, runtime = {"torch": (TorchEncoder, Runtime.TORCH), "onnx": (OnnxEncoder, Runtime.ONNX)}[request.param]
    return kind(directory, manifest_of(reference, runtime, Precision.FP32), EngineOptions())


def test_values_are_float32_and_timed(engine, reference):
    engine.warm_up()
    outputs = engine.run(sample_rows(reference))
    assert outputs.values.dtype == np.float32
    assert outputs.values.shape == (8, 4)
    assert outputs.infer_ms > 0


def test_token_outside_the_vocabulary_is_an_engine_error(engine):
    bad = Rows(np.array([5, 9999], np.int32), np.array([2], np.int32))
    with pytest.raises(EngineError, match="failed on a batch of 1 rows") as caught:
        engine.run(bad)
    assert "/" not in caught.value.message
    assert engine.run(Rows(np.array([5, 6], np.int32), np.array([2], np.int32))).values.shape == (1, 4)


def test_closed_engine_says_so(engine, reference):
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(sample_rows(reference))


def test_batch_larger_than_a_call_keeps_the_order_of_rows(reference, graph_directory):
    engine = OnnxEncoder(graph_directory, manifest_of(reference, Runtime.ONNX, Precision.FP32), EngineOptions())
    random = np.random.default_rng(0)
    rows = [Row(random.integers(5, 80, length).astype(np.int32)) for length in random.integers(1, 40, 50)]
    together = Rows.of(rows)
    assert together.tokens > 3 * CALL_TOKENS
    alone = np.concatenate([engine.run(Rows.of([row])).values for row in rows])
    np.testing.assert_allclose(engine.run(together).values, alone, atol=1e-4)


def test_onnx_worker_imports_no_torch():
    code = "import sys, workers.onnx_encoder; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("kind", [TorchEncoder, OnnxEncoder])
def test_missing_cuda_is_a_usage_error(kind, reference, torch_directory, graph_directory):
    directory = torch_directory if kind is TorchEncoder else graph_directory
    manifest = manifest_of(reference, Runtime.TORCH, Precision.FP32)
    with pytest.raises(UsageError, match="set device to cpu"):
        kind(directory, manifest, EngineOptions(device="cuda"))


@pytest.mark.parametrize("kind", [TorchEncoder, OnnxEncoder])
def test_damaged_files_are_a_family_error(kind, reference, tmp_path):
    save_checkpoint(reference, tmp_path, torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    (tmp_path / "model.onnx").write_bytes(b"x" * 99)
    with pytest.raises(FamilyError, match="fettle optimize"):
        kind(tmp_path, manifest_of(reference, Runtime.TORCH, Precision.FP32), EngineOptions())


def test_torch_refuses_int8(reference, torch_directory):
    with pytest.raises(UsageError, match="int8"):
        TorchEncoder(torch_directory, manifest_of(reference, Runtime.TORCH, Precision.INT8), EngineOptions())


def test_half_precision_checkpoint(reference, torch_directory, tmp_path):
    save_checkpoint(reference, tmp_path, torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    rows = sample_rows(reference)
    half = TorchEncoder(tmp_path, manifest_of(reference, Runtime.TORCH, Precision.BF16), EngineOptions())
    full = TorchEncoder(torch_directory, manifest_of(reference, Runtime.TORCH, Precision.FP32), EngineOptions())
    values, expected = half.run(rows).values, full.run(rows).values
    assert values.dtype == np.float32
    assert 0 < np.abs(values - expected).max() < 0.1 * np.abs(expected).max()
    assert {weight.dtype for weight in reference.model.parameters()} == {torch.float32}


def test_int8_graph_is_smaller_and_counted(graph_directory, tmp_path):
    notes = quantize_dynamic_int8(graph_directory / "model.onnx", tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert notes["quantized"] == sum(node.op_type == "MatMulInteger" for node in model.graph.node) >= 12
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert {item.data_type for item in model.graph.initializer} >= {onnx.TensorProto.INT8}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx2"}, True), ({"avx512f", "avx512bw"}, True), ({"avx2", "avx_vnni"}, False), ({"asimddp"}, False)],
)
def test_saturation_follows_the_processor(flags, expected):
    assert saturates(flags) is expected
