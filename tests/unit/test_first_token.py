"""The last layer for the first token alone: the same answers, and really less work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fettle.rows import Rows
from optimize.export import export_onnx
from optimize.first_token import QUANTIZED_TOLERANCE, first_token
from optimize.fuse import fuse
from optimize.load import Reference, load_reference
from optimize.quantize_rows import quantize_rows_int8
from tests.unit import tiny_models
from tests.unit.test_architectures import distance, sample_rows

TOLERANCE = 1e-5
FUSED = ("bert", "roberta", "electra", "distilbert")
# Their attention is several operators, so that only what follows it is cut: the output projection and the network.
UNFUSED = ("mpnet", "modernbert")


@dataclass(frozen=True)
class Pair:
    reference: Reference
    full: Path
    narrow: Path
    notes: dict

    def run(self, path: Path, rows: Rows, extra: tuple[str, ...] = ()) -> list[np.ndarray]:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        arrays = dict(zip(("input_ids", "attention_mask", "token_type_ids"), rows.padded(tiny_models.PAD), strict=True))
        return session.run(["values", *extra], {item.name: arrays[item.name] for item in session.get_inputs()})


def pair(source: Path, directory: Path) -> Pair:
    reference = load_reference(str(source))
    sample = sample_rows(reference)
    export_onnx(reference, directory / "plain.onnx", sample)
    fuse(directory / "plain.onnx", directory / "full.onnx", sample, reference.tokenizer)
    notes = first_token(directory / "full.onnx", directory / "narrow.onnx", sample, reference.tokenizer)
    return Pair(reference, directory / "full.onnx", directory / "narrow.onnx", notes)


def shapes(built: Pair, path: Path, rows: Rows) -> list[tuple[str, tuple[int, ...]]]:
    """What each MatMul and Attention with constant weights gives, as it runs."""
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.op_type in ("MatMul", "Attention")]
    kinds = {node.output[0]: node.op_type for node in nodes}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in kinds)
    opened = path.with_name("opened.onnx")
    onnx.save(model, opened)
    arrays = built.run(opened, rows, tuple(kinds))[1:]
    return [(kind, array.shape) for kind, array in zip(kinds.values(), arrays, strict=True)]


@pytest.fixture(scope="module", params=FUSED + UNFUSED)
def built(request, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    return pair(tiny_models.classifier(folder / "source", request.param), folder)


def fused(built: Pair) -> bool:
    return built.reference.config.model_type in FUSED


def test_answers_are_the_same(built):
    rows = sample_rows(built.reference, seed=1, typed=True)
    assert distance(built.run(built.narrow, rows)[0], built.run(built.full, rows)[0]) < TOLERANCE


def test_one_token_is_answered_too(built):
    rows = Rows(np.array([7, 8], np.int32), np.array([1, 1], np.int32))
    assert distance(built.run(built.narrow, rows)[0], built.run(built.full, rows)[0]) < TOLERANCE


def test_the_last_layer_sees_one_token_a_row(built):
    rows = sample_rows(built.reference, seed=2)
    before, after = (shapes(built, path, rows) for path in (built.full, built.narrow))
    assert len(before) == len(after)
    narrow = [kind for kind, shape in after if len(shape) == 3 and shape[1] == 1]
    assert not any(len(shape) == 3 and shape[1] == 1 for _, shape in before)
    # Attention's output projection and the two of the network; the query and the attention too where it is fused.
    assert narrow == (["MatMul", "Attention"] if fused(built) else []) + ["MatMul"] * 3
    # Keys and values are still wanted of every token, and the other layer is as it was.
    wide = [shape for _, shape in after if len(shape) == 3 and shape[1] == rows.longest]
    assert len(wide) == len([shape for _, shape in before if len(shape) == 3]) - len(narrow)


def test_notes_say_what_was_cut(built):
    assert built.notes["trimmed"] == 1
    assert built.notes["attentions"] == int(fused(built))
    assert built.notes["max_difference"] < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_graph_that_is_quantized_for_each_token_is_cut_as_well(tmp_path, name, calibrated):
    built = pair(tiny_models.classifier(tmp_path / "source", name), tmp_path)
    spec, sample = built.reference.tokenizer, sample_rows(built.reference)
    ranges = (sample_rows(built.reference, seed=5), spec) if calibrated else ()
    whole, cut = tmp_path / "whole.onnx", tmp_path / "cut.onnx"
    quantize_rows_int8(built.full, whole, *ranges)
    notes = first_token(whole, cut, sample, spec)
    assert notes["trimmed"] == 1, notes
    assert notes["attentions"] == 1
    rows = sample_rows(built.reference, seed=6)
    # A rounding difference may choose the neighbouring one of 255 codes.
    assert distance(built.run(cut, rows)[0], built.run(whole, rows)[0]) < QUANTIZED_TOLERANCE
    scales = [node for node in onnx.load(cut).graph.node if node.op_type == "QuantizeLinear"]
    assert len(scales) == len([node for node in onnx.load(whole).graph.node if node.op_type == "QuantizeLinear"])


@pytest.mark.parametrize(("pooling", "trimmed"), [("mean", 0), ("cls", 1)])
def test_what_reads_every_token_stays_whole(tmp_path, pooling, trimmed):
    built = pair(tiny_models.sentence_transformer(tmp_path / "source", pooling), tmp_path)
    assert built.notes["trimmed"] == trimmed
    assert ("reason" in built.notes) == (trimmed == 0)
    rows = sample_rows(built.reference, seed=3)
    assert distance(built.run(built.narrow, rows)[0], built.run(built.full, rows)[0]) < TOLERANCE


def graph_of(path: Path, nodes: list, weights: dict[str, np.ndarray], outputs: dict[str, int]) -> Path:
    """A small graph over `hidden`, made from the ids by an embedding of 8 numbers."""
    helper = onnx.helper
    table = np.random.default_rng(0).normal(size=(tiny_models.VOCABULARY, 8)).astype(np.float32)
    constants = {"table": table, "zero": np.array(0), **weights}
    described = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank) for name, rank in outputs.items()
    ]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "input_ids"], ["hidden"]), *nodes],
            "graph",
            [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "length"])],
            described,
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )  # fmt: skip
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def test_what_is_read_in_full_keeps_its_path(tmp_path):
    """An exit's layer feeds the layers above as well: the graph holds both, and cutting it leaves either."""
    node = onnx.helper.make_node
    weight = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    nodes = [
        node("MatMul", ["hidden", "weight"], ["up"]),
        node("Tanh", ["up"], ["bent"]),
        node("Gather", ["bent", "zero"], ["values"], axis=1),
        node("Relu", ["bent"], ["rest"]),
    ]
    reference = load_reference(str(tiny_models.classifier(tmp_path / "source", "roberta")))
    path = graph_of(tmp_path / "full.onnx", nodes, {"weight": weight}, {"values": 2, "rest": 3})
    sample = sample_rows(reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimize.export.input_names", lambda spec: ["input_ids"])
        notes = first_token(path, tmp_path / "narrow.onnx", sample, reference.tokenizer)
    assert notes["operators"] == 2
    made = [item.op_type for item in onnx.load(tmp_path / "narrow.onnx").graph.node]
    assert made.count("MatMul") == made.count("Tanh") == 2


def test_operators_between_tokens_are_not_passed(tmp_path):
    """A softmax over the tokens is not alike for all of them: what precedes it stays whole."""
    node = onnx.helper.make_node
    nodes = [
        node("Softmax", ["hidden"], ["mixed"], axis=1),
        node("Tanh", ["mixed"], ["bent"]),
        node("Gather", ["bent", "zero"], ["values"], axis=1),
    ]
    reference = load_reference(str(tiny_models.classifier(tmp_path / "source", "roberta")))
    path = graph_of(tmp_path / "full.onnx", nodes, {}, {"values": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimize.export.input_names", lambda spec: ["input_ids"])
        notes = first_token(path, tmp_path / "narrow.onnx", sample_rows(reference), reference.tokenizer)
    assert notes["operators"] == 1
    made = [item.op_type for item in onnx.load(tmp_path / "narrow.onnx").graph.node]
    assert made == ["Gather", "Softmax", "Slice", "Tanh", "Gather"]
