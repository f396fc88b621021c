"""The quantization passes: their arithmetic against numpy, their graphs on every architecture, and batch invariance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fettle.errors import DataError, PassError, UsageError
from fettle.manifest import TokenizerSpec
from fettle.rows import Row, Rows
from optimize.export import export_onnx, input_names
from optimize.fuse import fuse
from optimize.linear_layers import GELU_FLOOR, PerRow, Static, find_linears, shared_weights, write_int8
from optimize.load import load_reference
from optimize.quantize import quantize_dynamic_int8, saturates
from optimize.quantize_rows import quantize_rows_int8
from optimize.quantize_static import quantize_static_int8
from optimize.quantize_weights import quantize_embeddings_int8, quantize_weights
from optimize.ranges import equalising_range, joined_error, static_range
from optimize.rounding import round_nearest, round_with_feedback
from tests.unit import tiny_models
from workers.onnx_encoder import session_options

LENGTHS = [1, 2, 19, 36, 7, 36, 11, 3]
# Layers of 32 wide-spread weights are the worst case for 8 bits: of the spread of the answers themselves.
INT8_TOLERANCE = 0.2
FLOAT, UINT = TensorProto.FLOAT, TensorProto.INT64


def sample_rows(seed: int = 0, lengths: list[int] = LENGTHS) -> Rows:
    random = np.random.default_rng(seed)
    first = len(tiny_models.SPECIAL)
    return Rows.of([Row(random.integers(first, tiny_models.VOCABULARY, n).astype(np.int32)) for n in lengths])


def calibration_rows() -> Rows:
    """Enough tokens that static ranges hold for others: 1,840."""
    return sample_rows(lengths=LENGTHS * 16)


def run(path: Path, rows: Rows, spec: TokenizerSpec, names: list[str] | None = None) -> np.ndarray:
    session = ort.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    feed = dict(zip(input_names(spec), rows.padded(spec.pad_id), strict=False))
    return np.concatenate(session.run(names or ["values"], feed), axis=1)


def alone(path: Path, rows: Rows, spec: TokenizerSpec) -> np.ndarray:
    ends = np.cumsum(rows.lengths)
    cut = [
        Rows(rows.ids[end - n : end], rows.lengths[i : i + 1])
        for i, (end, n) in enumerate(zip(ends, rows.lengths, strict=True))
    ]
    return np.concatenate([run(path, row, spec) for row in cut])


@pytest.fixture(scope="module", params=tiny_models.CLASSIFIERS)
def fused(request, tmp_path_factory) -> tuple[Path, TokenizerSpec]:
    folder = tmp_path_factory.mktemp(request.param)
    reference = load_reference(str(tiny_models.classifier(folder / "source", request.param)))
    export_onnx(reference, folder / "plain.onnx", sample_rows())
    fuse(folder / "plain.onnx", folder / "fused.onnx", sample_rows(), reference.tokenizer)
    return folder / "fused.onnx", reference.tokenizer


PASSES = {
    "rows": lambda source, path, spec: quantize_rows_int8(source, path, calibration_rows(), spec),
    "rows without calibration": lambda source, path, spec: quantize_rows_int8(source, path),
    "static": lambda source, path, spec: quantize_static_int8(source, path, calibration_rows(), spec),
    "dynamic": lambda source, path, spec: quantize_dynamic_int8(source, path),
    "weights": lambda source, path, spec: quantize_weights(source, path, bits=8),
    "embeddings": lambda source, path, spec: quantize_embeddings_int8(source, path, smallest=30),
}


@pytest.mark.parametrize("name", PASSES)
def test_every_architecture_stays_near(fused, tmp_path, name):
    source, spec = fused
    notes = PASSES[name](source, tmp_path / "out.onnx", spec)
    assert notes.get("quantized", notes.get("tables")) >= 1
    rows = sample_rows(seed=3)
    expected, values = run(source, rows, spec), run(tmp_path / "out.onnx", rows, spec)
    assert np.isfinite(values).all()
    assert np.abs(values - expected).mean() < INT8_TOLERANCE * expected.std()


@pytest.mark.parametrize("name", ["rows", "rows without calibration", "static"])
def test_no_answer_depends_on_the_batch(fused, tmp_path, name):
    source, spec = fused
    PASSES[name](source, tmp_path / "out.onnx", spec)
    rows = sample_rows(seed=4)
    scale = np.abs(alone(source, rows, spec)).max()
    float_kernels = np.abs(run(source, rows, spec) - alone(source, rows, spec)).max()
    moved = np.abs(run(tmp_path / "out.onnx", rows, spec) - alone(tmp_path / "out.onnx", rows, spec)).max()
    # Where the float kernels themselves move by a last bit, that bit may turn one code over.
    assert moved <= (1e-6 if float_kernels == 0 else 0.05) * scale


def test_dynamic_int8_does_depend_on_the_batch(tmp_path):
    """What the other schemes are for; if this ever fails, they have lost their reason."""
    reference = load_reference(str(tiny_models.classifier(tmp_path / "source", "bert")))
    export_onnx(reference, tmp_path / "plain.onnx", sample_rows())
    quantize_dynamic_int8(tmp_path / "plain.onnx", tmp_path / "out.onnx")
    rows = sample_rows(seed=4)
    together = run(tmp_path / "out.onnx", rows, reference.tokenizer)
    assert np.abs(together - alone(tmp_path / "out.onnx", rows, reference.tokenizer)).max() > 1e-3


def test_shared_weights_stay_one(fused, tmp_path):
    source, spec = fused
    linears = find_linears(onnx.load(source))
    quantize_rows_int8(source, tmp_path / "out.onnx", calibration_rows(), spec)
    weights = [
        item for item in onnx.load(tmp_path / "out.onnx").graph.initializer if item.data_type == TensorProto.INT8
    ]
    contents = [(tuple(item.dims), item.raw_data) for item in weights]
    assert len(contents) == len(set(contents))
    assert len(weights) <= len({linear.name for linear in linears})
    assert shared_weights(linears) or "albert" not in str(source)


# Graphs made by hand: uneven widths, and several outputs.


def layer(name: str, source: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[list, list]:
    weight = numpy_helper.from_array(random.normal(size=shape).astype(np.float32), f"{name}_weight")
    bias = numpy_helper.from_array(random.normal(size=shape[1]).astype(np.float32), f"{name}_bias")
    nodes = [
        helper.make_node("MatMul", [source, weight.name], [f"{name}_product"]),
        helper.make_node("Add", [f"{name}_product", bias.name], [name]),
    ]
    return nodes, [weight, bias]


def uneven_graph(path: Path) -> TokenizerSpec:
    """Embeddings, 20 -> 27 -> GELU -> 20 with exits on both; `exit_0` reads the product before its bias too."""
    random = np.random.default_rng(0)
    table = random.normal(size=(tiny_models.VOCABULARY, 20)).astype(np.float32)
    parts = [layer("up", "embedded", (20, 27), random), layer("down", "gelu", (27, 20), random)]
    parts += [layer("early", "embedded_first", (20, 4), random), layer("late", "down_first", (20, 4), random)]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["embedded"]), *parts[0][0]]
    nodes += [helper.make_node("Gelu", ["up"], ["gelu"]), *parts[1][0]]
    nodes += [helper.make_node("Gather", [name, "zero"], [f"{name}_first"], axis=1) for name in ("embedded", "down")]
    nodes += [*parts[2][0], *parts[3][0]]
    nodes += [helper.make_node("Identity", [a], [b]) for a, b in (("early", "exit_0"), ("late", "values"))]
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(0), "zero")]
    inputs = [helper.make_tensor_value_info(name, UINT, ["b", "n"]) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["b", 4]) for name in ("exit_0", "values")]
    outputs.append(helper.make_tensor_value_info("up_product", FLOAT, ["b", "n", 27]))
    graph = helper.make_graph(nodes, "uneven", inputs, outputs, weights + [item for _, made in parts for item in made])
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return TokenizerSpec(max_length=36, vocabulary=tiny_models.VOCABULARY, pad_id=tiny_models.PAD, segments=False)


@pytest.mark.parametrize("calibrated", [True, False])
def test_uneven_widths_and_several_outputs(tmp_path, calibrated):
    spec = uneven_graph(tmp_path / "in.onnx")
    given = (calibration_rows(), spec) if calibrated else ()
    notes = quantize_rows_int8(tmp_path / "in.onnx", tmp_path / "out.onnx", *given)
    assert notes["quantized"] == 4
    # The exits read one token of each row: too few for a range.
    assert notes["inputs"] == ({"static": 1, "per_row": 3} if calibrated else {"per_row": 4})
    names = [item.name for item in onnx.load(tmp_path / "out.onnx").graph.output]
    assert names == ["exit_0", "values", "up_product"]
    rows = sample_rows(seed=3)
    for name in ("exit_0", "values"):
        expected, values = (run(tmp_path / file, rows, spec, [name]) for file in ("in.onnx", "out.onnx"))
        assert np.abs(values - expected).max() < 0.03 * np.abs(expected).max()


def test_static_leaves_the_worst_in_float(tmp_path):
    spec = uneven_graph(tmp_path / "in.onnx")
    model = onnx.load(tmp_path / "in.onnx")
    del model.graph.output[2]
    onnx.save(model, tmp_path / "in.onnx")
    notes = quantize_static_int8(
        tmp_path / "in.onnx",
        tmp_path / "out.onnx",
        sample_rows(),
        spec,
        left_share=0.5,
        method="minmax",
        equalise=False,
    )
    changes = notes["sensitivity"]
    assert notes["left_float"] == 2
    assert set(notes["left_inputs"]) == set(sorted(changes, key=changes.get)[2:])
    everything = quantize_static_int8(tmp_path / "in.onnx", tmp_path / "all.onnx", sample_rows(), spec, left_share=0)
    assert (everything["left_float"], everything["sensitivity"]) == (0, {})


# Arithmetic against numpy.


def single_layer(
    scheme: Static | PerRow, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, path: Path
) -> np.ndarray:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    values = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    ends = [[helper.make_tensor_value_info(name, FLOAT, [None, None])] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", *ends, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    linears = find_linears(model)
    factors = getattr(scheme, "factors", None)
    rounded = round_nearest(weight if factors is None else weight * factors[:, None])
    assert write_int8(model, linears, {"x": scheme}, {"p": rounded}) == 1
    onnx.save(model, path)
    session = ort.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_schemes_compute_what_they_say(tmp_path):
    random = np.random.default_rng(0)
    weight = random.normal(size=(24, 9)).astype(np.float32)
    bias = random.normal(size=9).astype(np.float32)
    x = random.normal(size=(5, 24)).astype(np.float32) * np.float32([[0], [0.01], [1], [5], [100]])
    rounded = round_nearest(weight).values()
    peak = np.abs(x).max(axis=1, keepdims=True)
    codes = np.round(x / np.maximum(peak / 127, 1e-20))
    expected = codes * peak / 127 @ rounded + bias
    values = single_layer(PerRow(), x, weight, bias, tmp_path / "rows.onnx")
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3 * float(peak.max()) * 0.01)

    # Counted from GELU's floor: each row within half a step of its own, and 0 exactly 0.
    gelu = np.maximum(x, -0.169).astype(np.float32)
    gelu[4] /= 10
    values = single_layer(PerRow(GELU_FLOOR), gelu, weight, bias, tmp_path / "floor.onnx")
    high = gelu.max(axis=1, keepdims=True)
    step = GELU_FLOOR / np.maximum(np.floor(255 * GELU_FLOOR / (high + GELU_FLOOR)), 1)
    bound = step / 2 * np.abs(rounded).sum(axis=0) + 1e-3
    assert (np.abs(values - (gelu @ rounded + bias)) <= bound).all()
    np.testing.assert_allclose(values[0], bias, atol=1e-4)

    factors = np.linspace(0.5, 4, 24).astype(np.float32)
    static = Static(-3.0, 5.0, factors)
    codes = np.clip(np.round(x / factors / static.scale) + static.zero, 0, 255) - static.zero
    expected = codes * static.scale @ round_nearest(weight * factors[:, None]).values() + bias
    values = single_layer(static, x, weight, bias, tmp_path / "static.onnx")
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=static.scale * 4)


def test_feedback_rounds_better_than_nearest_on_its_data():
    random = np.random.default_rng(0)
    mixing = random.normal(size=(160, 160))
    tokens = (random.normal(size=(4000, 160)) @ mixing * np.geomspace(0.1, 10, 160)).astype(np.float32)
    weight = random.normal(size=(160, 12)).astype(np.float32)
    errors = [
        np.mean((tokens @ (rounded.values() - weight)) ** 2)
        for rounded in (round_nearest(weight), round_with_feedback(weight, tokens.T @ tokens))
    ]
    assert errors[1] < 0.8 * errors[0]
    # Inputs that are never anything but 0 say nothing about their weights.
    assert np.isfinite(round_with_feedback(weight, np.zeros((160, 160), np.float32)).values()).all()


def test_zero_channels_round_to_zero():
    assert (round_nearest(np.zeros((3, 2), np.float32)).values() == 0).all()


def test_equalising_serves_unequal_channels():
    random = np.random.default_rng(0)
    tokens = random.normal(size=(500, 64)).astype(np.float32)
    tokens[:, 5] *= 60
    weight = numpy_helper.from_array(random.normal(size=(64, 16)).astype(np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [weight])
    linears = find_linears(helper.make_model(graph))
    plain = joined_error(tokens, linears, static_range(tokens, linears, "minmax"))
    clipped = joined_error(tokens, linears, static_range(tokens, linears, "error"))
    equalised = joined_error(tokens, linears, equalising_range(tokens, linears))
    assert clipped <= plain
    assert equalised < 0.2 * plain
    low, high = np.percentile(tokens, [0.01, 99.99])
    percentile = static_range(tokens, linears, "percentile")
    assert (percentile.low, percentile.high) == pytest.approx((low, high))


def test_seven_bit_weights_where_products_saturate(tmp_path, monkeypatch):
    assert saturates({"avx2"})
    assert not saturates({"avx2", "avx512_vnni"})
    monkeypatch.setattr("optimize.quantize.cpu_flags", lambda: {"avx2"})
    uneven_graph(tmp_path / "in.onnx")
    assert quantize_rows_int8(tmp_path / "in.onnx", tmp_path / "out.onnx")["reduced_range"]
    weights = [
        item for item in onnx.load(tmp_path / "out.onnx").graph.initializer if item.data_type == TensorProto.INT8
    ]
    assert max(np.abs(numpy_helper.to_array(item)).max() for item in weights) == 63


def test_embeddings_keep_their_values(tmp_path):
    spec = uneven_graph(tmp_path / "in.onnx")
    notes = quantize_embeddings_int8(tmp_path / "in.onnx", tmp_path / "out.onnx", smallest=30)
    rows = tiny_models.VOCABULARY
    assert notes == {"tables": 1, "bytes_saved": rows * 20 * 4 - rows * 20 - rows * 4}
    batch = sample_rows(seed=3)
    values, expected = (run(tmp_path / name, batch, spec) for name in ("out.onnx", "in.onnx"))
    assert np.abs(values - expected).max() < 0.02 * np.abs(expected).max()
    assert quantize_embeddings_int8(tmp_path / "in.onnx", tmp_path / "no.onnx", smallest=10**6)["tables"] == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone(tmp_path, bits):
    spec = uneven_graph(tmp_path / "in.onnx")
    assert quantize_weights(tmp_path / "in.onnx", tmp_path / "out.onnx", bits=bits) == {"quantized": 4, "left_float": 0}
    batch = sample_rows(seed=3)
    values, expected = (run(tmp_path / name, batch, spec) for name in ("out.onnx", "in.onnx"))
    assert np.abs(values - expected).mean() < (0.02 if bits == 8 else 0.2) * expected.std()


def test_what_cannot_be_quantized_is_said(tmp_path):
    spec = uneven_graph(tmp_path / "in.onnx")
    nothing = Rows(np.zeros(0, np.int32), np.zeros(0, np.int32))
    with pytest.raises(DataError, match="at least one row"):
        quantize_rows_int8(tmp_path / "in.onnx", tmp_path / "out.onnx", nothing, spec)
    with pytest.raises(UsageError, match="left_share"):
        quantize_static_int8(tmp_path / "in.onnx", tmp_path / "out.onnx", sample_rows(), spec, left_share=1)
    ends = [[helper.make_tensor_value_info(name, FLOAT, ["n"])] for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", *ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "r.onnx")
    for attempt in (quantize_rows_int8, quantize_dynamic_int8, quantize_weights):
        with pytest.raises(PassError, match="no "):
            attempt(tmp_path / "r.onnx", tmp_path / "out.onnx")
