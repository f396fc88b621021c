"""Decoder graphs in 8 and 4 bits: near float32, the same bits in every batch, smaller, rounded as promised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fettle.errors import DataError, PassError, UsageError
from fettle.rows import Row, Rows
from optimize.block_rounding import (
    Blocks,
    packed,
    round_blocks,
    round_blocks_fitted,
    round_blocks_half_quadratic,
    round_blocks_to_8_bits,
    round_blocks_with_feedback,
)
from optimize.decoder_graph import export_decoder
from optimize.decoder_graph_parts import decoder_spec
from optimize.decoder_observe import text_feeds
from optimize.decoder_quantize import quantize_decoder_int4, quantize_decoder_int8
from optimize.fuse import MICROSOFT
from tests.unit.tiny_decoders import VOCABULARY, tiny_decoder
from workers.engine import EngineOptions
from workers.onnx_decoder import GraphRunner

LENGTHS = np.array([5, 17, 9, 30], np.int32)
# Layers of 48 wide-spread weights are the worst case: mean distance of the logits, in units of their spread.
TOLERANCES = {"int8": 0.1, "int8 calibrated": 0.12, "int4": 0.5, "int4 calibrated": 0.5, "int4 half-quadratic": 0.5}


def texts(count: int = 60, seed: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    return Rows.of([Row(random.integers(0, VOCABULARY, random.integers(4, 40)).astype(np.int32)) for _ in range(count)])


PASSES: dict[str, Callable[[Path, Path], dict]] = {
    "int8": quantize_decoder_int8,
    "int8 calibrated": lambda source, path: quantize_decoder_int8(source, path, texts()),
    "int4": lambda source, path: quantize_decoder_int4(source, path, block=16),
    "int4 calibrated": lambda source, path: quantize_decoder_int4(source, path, texts(), block=16, head_bits=4),
    "int4 half-quadratic": lambda source, path: quantize_decoder_int4(
        source, path, block=16, rounding="half-quadratic"
    ),
}
MODELS = {
    "llama tied": ("llama", True),
    "llama": ("llama-biased", False),
    "gemma": ("gemma3", True),
    "qwen": ("qwen3", True),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    name, tied = MODELS[request.param]
    model = tiny_decoder(name, tied=tied)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_decoder(model, path)
    return path, decoder_spec(model.config)


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(7)
    return [random.integers(0, VOCABULARY, length).astype(np.int32) for length in LENGTHS]


def logits_of(path: Path, spec, order: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Of the prompts in this order: all logits of each, and those of one step of all of them together."""
    with contextlib.closing(GraphRunner(path, spec, EngineOptions())) as runner:
        runner.allocate(len(order), 48)
        each = [prompts()[index] for index in order]
        found = [runner.feed(slot, ids, 0, len(ids)) for slot, ids in enumerate(each)]
        step = runner.decode(np.array([ids[0] for ids in each]), LENGTHS[order])
    return found, step


@pytest.mark.parametrize("name", PASSES)
def test_graph_stays_near_and_shrinks(exported, tmp_path, name):
    source, spec = exported
    notes = PASSES[name](source, tmp_path / "out.onnx")
    assert notes["quantized"] == 3 * 4 + 1
    order = list(range(len(LENGTHS)))
    expected, found = logits_of(source, spec, order), logits_of(tmp_path / "out.onnx", spec, order)
    for ours, theirs in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
        distance = np.abs(ours - theirs).mean() / theirs.std()
        assert 0 < distance < TOLERANCES[name]
    kept = {item.data_type for item in onnx.load(tmp_path / "out.onnx").graph.initializer if len(item.raw_data) > 2000}
    # Tables of rotary angles stay float32, and nothing else of that size.
    assert kept <= {TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT}
    assert (tmp_path / "out.onnx").stat().st_size < 0.55 * source.stat().st_size


@pytest.mark.parametrize("name", PASSES)
def test_no_row_depends_on_the_others(exported, tmp_path, name):
    source, spec = exported
    PASSES[name](source, tmp_path / "out.onnx")
    together = logits_of(tmp_path / "out.onnx", spec, [0, 1, 2, 3])[1]
    backwards = logits_of(tmp_path / "out.onnx", spec, [3, 2, 1, 0])[1]
    assert np.array_equal(together, backwards[::-1])
    for index in range(len(LENGTHS)):
        assert np.array_equal(logits_of(tmp_path / "out.onnx", spec, [index])[1][0], together[index])


@pytest.mark.parametrize(
    "quantize", [quantize_decoder_int8, lambda source, path: quantize_decoder_int4(source, path, block=16)]
)
def test_head_and_table_are_one_matrix(tmp_path, quantize):
    export_decoder(tiny_decoder(), tmp_path / "source.onnx")
    assert quantize(tmp_path / "source.onnx", tmp_path / "out.onnx")["tied"]
    large = [
        item for item in onnx.load(tmp_path / "out.onnx").graph.initializer if np.prod(item.dims) >= VOCABULARY * 48
    ]
    assert [item.data_type in (TensorProto.INT8, TensorProto.UINT8) for item in large] == [True]


def test_table_whose_width_no_block_divides_is_stored_apart(tmp_path):
    model = tiny_decoder(hidden_size=40)
    export_decoder(model, tmp_path / "source.onnx")
    assert not quantize_decoder_int4(tmp_path / "source.onnx", tmp_path / "out.onnx")["tied"]
    spec = decoder_spec(model.config)
    expected, found = (logits_of(tmp_path / name, spec, [1, 0])[1] for name in ("source.onnx", "out.onnx"))
    assert np.abs(found - expected).mean() < TOLERANCES["int4"] * expected.std()


def test_ranges_become_part_of_the_norms(tmp_path):
    export_decoder(tiny_decoder(tied=False), tmp_path / "source.onnx")
    notes = quantize_decoder_int8(tmp_path / "source.onnx", tmp_path / "out.onnx", texts())
    assert notes["inputs"]["static"] >= 3
    gains = [
        {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / name).graph.initializer}
        for name in ("source.onnx", "out.onnx")
    ]
    changed = [
        name for name in gains[0] if name.endswith(".gain") and not np.array_equal(gains[0][name], gains[1][name])
    ]
    assert changed


def test_calibration_texts_run_as_the_runner_runs_them(exported):
    source, spec = exported
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    ids = np.concatenate(prompts())
    for feed, expected in zip(
        text_feeds(onnx.load(source), Rows(ids, LENGTHS)), logits_of(source, spec, [0, 1, 2, 3])[0], strict=True
    ):
        np.testing.assert_allclose(session.run(["logits"], feed)[0], expected, rtol=0, atol=1e-4)


def test_what_cannot_be_done_is_said(tmp_path):
    export_decoder(tiny_decoder(), tmp_path / "source.onnx")
    source, path = tmp_path / "source.onnx", tmp_path / "out.onnx"
    with pytest.raises(UsageError, match="16, 32, 64"):
        quantize_decoder_int4(source, path, block=48)
    with pytest.raises(UsageError, match="needs texts"):
        quantize_decoder_int4(source, path, rounding="feedback")
    with pytest.raises(DataError, match="at least one text"):
        quantize_decoder_int8(source, path, Rows(np.zeros(0, np.int32), np.zeros(0, np.int32)))
    graph = helper.make_graph([], "empty", [], [])
    onnx.save(helper.make_model(graph), source)
    with pytest.raises(PassError, match="no linear layer"):
        quantize_decoder_int8(source, path)


# The arithmetic of blocks.


def layer(inputs: int = 100, outputs: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and 2,000 inputs whose channels are correlated and uneven."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(2000, inputs // 4)) @ random.normal(size=(inputs // 4, inputs))
    uneven = (mixed + 0.3 * random.normal(size=mixed.shape)) * np.exp(random.normal(size=inputs))
    return random.standard_t(4, size=(inputs, outputs)).astype(np.float32), uneven.astype(np.float32)


def test_calibrated_rounding_costs_the_output_less():
    weight, inputs = layer()
    gram = inputs.T @ inputs
    candidates = {
        "nearest": round_blocks(weight, 32),
        "fitted": round_blocks_fitted(weight, 32, np.diag(gram)),
        "feedback": round_blocks_with_feedback(weight, gram, 32),
    }
    costs = {name: float(np.square(inputs @ (blocks.values() - weight)).sum()) for name, blocks in candidates.items()}
    assert costs["feedback"] < 0.7 * costs["fitted"] < 0.7 * 0.95 * costs["nearest"]


def test_fitted_scales_cost_the_weights_less():
    weight, _ = layer()
    nearest, fitted = (
        np.square(each(weight, 32).values() - weight).sum() for each in (round_blocks, round_blocks_fitted)
    )
    assert fitted < 0.95 * nearest


def test_half_quadratic_rounding_serves_lopsided_blocks():
    weight = np.abs(layer()[0])
    lopsided = round_blocks_half_quadratic(weight, 32)
    assert lopsided.zeros is not None
    errors = [np.abs(each.values() - weight).mean() for each in (lopsided, round_blocks(weight, 32))]
    assert errors[0] < 0.8 * errors[1]


def test_8_bits_lose_less_than_4():
    weight, _ = layer()
    wide, narrow = (np.abs(each(weight, 32).values() - weight).max() for each in (round_blocks_to_8_bits, round_blocks))
    assert wide < narrow / 10


def test_zeros_stay_zeros():
    for each in (round_blocks, round_blocks_fitted, round_blocks_half_quadratic, round_blocks_to_8_bits):
        assert not each(np.zeros((40, 3), np.float32), 32).values().any()


@pytest.mark.parametrize("each", [round_blocks, round_blocks_half_quadratic, round_blocks_to_8_bits])
@pytest.mark.parametrize("size", [16, 32, 128])
def test_onnx_runtime_reads_the_blocks_as_they_are_meant(each, size):
    weight, inputs = layer()
    blocks = each(weight, size)
    np.testing.assert_allclose(product(inputs[:7], blocks), inputs[:7] @ blocks.values(), rtol=1e-3, atol=1e-3)


def product(inputs: np.ndarray, blocks: Blocks) -> np.ndarray:
    """By MatMulNBits with float sums."""
    constants = [array for array in packed(blocks) if array is not None]
    names = ["codes", "scales", "zeros"][: len(constants)]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *names],
        ["y"],
        domain=MICROSOFT,
        K=len(blocks.codes),
        N=blocks.codes.shape[1],
        bits=blocks.bits,
        block_size=blocks.size,
        accuracy_level=1,
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None]) for name in ("x", "y")]
    graph = helper.make_graph(
        [node], "product", ends[:1], ends[1:], list(map(numpy_helper.from_array, constants, names))
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs})[0]
