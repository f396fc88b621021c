"""Padding-free graphs: the same answers for every architecture, and really no padding where no attention is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fettle.rows import Rows
from optimize.export import export_onnx
from optimize.first_token import first_token
from optimize.fuse import fuse
from optimize.load import Reference, load_reference
from optimize.pack import PADDED, PRODUCTS, pack, unpack
from optimize.quantize import quantize_dynamic_int8
from optimize.quantize_rows import quantize_rows_int8
from tests.unit import tiny_models
from tests.unit.test_architectures import distance, sample_rows
from tests.unit.test_first_token import graph_of
from workers.onnx_encoder import session_options

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Packed:
    reference: Reference
    padded: Path
    path: Path
    notes: dict


def packed(source: Path, directory: Path) -> Packed:
    reference = load_reference(str(source))
    sample, spec = sample_rows(reference), reference.tokenizer
    export_onnx(reference, directory / "plain.onnx", sample)
    fuse(directory / "plain.onnx", directory / "fused.onnx", sample, spec)
    first_token(directory / "fused.onnx", directory / "padded.onnx", sample, spec)
    notes = pack(directory / "padded.onnx", directory / "packed.onnx", sample, spec)
    return Packed(reference, directory / "padded.onnx", directory / "packed.onnx", notes)


def run(path: Path, rows: Rows, extra: tuple[str, ...] = ()) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    arrays = dict(zip(("input_ids", "attention_mask", "token_type_ids"), rows.padded(tiny_models.PAD), strict=True))
    return session.run(["values", *extra], {item.name: arrays[item.name] for item in session.get_inputs()})


def products(path: Path, rows: Rows) -> list[tuple[int, ...]]:
    """The shapes that products with weights give, as they run."""
    model = onnx.load(path)
    weights = {item.name for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in PRODUCTS and node.input[1] in weights]
    names = tuple(node.output[0] for node in nodes)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    opened = path.with_name("opened.onnx")
    onnx.save(model, opened)
    return [array.shape for array in run(opened, rows, names)[1:]]


# One operator for attention, with shared layers, rotary angles, and relative places; an export takes seconds each.
NAMES = ("bert", "albert", "modernbert", "deberta-v2", "mpnet")


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, Packed]:
    """Filled as they are asked for: a graph takes seconds to export."""

    class Known(dict):
        def __missing__(self, name: str) -> Packed:
            folder = tmp_path_factory.mktemp(name)
            self[name] = packed(tiny_models.classifier(folder / "source", name), folder)
            return self[name]

    return Known()


@pytest.fixture(params=NAMES)
def built(request, known) -> Packed:
    return known[request.param]


def test_answers_are_the_same(built):
    assert built.notes["packed"], built.notes
    for seed in range(3):
        rows = sample_rows(built.reference, seed=seed, typed=True)
        assert distance(run(built.path, rows)[0], run(built.padded, rows)[0]) < TOLERANCE


def test_one_token_is_answered_too(built):
    rows = Rows(np.array([7, 8, 9], np.int32), np.array([1, 2], np.int32))
    assert distance(run(built.path, rows)[0], run(built.padded, rows)[0]) < TOLERANCE


def test_products_see_no_padding(built):
    rows = sample_rows(built.reference, seed=2)
    shapes = products(built.path, rows)
    assert {shape[:2] for shape in products(built.padded, rows) if len(shape) == 3} & {(len(rows), rows.longest)}
    assert (1, rows.tokens) in {shape[:2] for shape in shapes}
    # DeBERTa's keys and queries of relative places are no tokens' of a row.
    if built.reference.config.model_type != "deberta-v2":
        assert {shape[:2] for shape in shapes if len(shape) == 3} <= {(1, rows.tokens), (len(rows), 1)}


def test_it_can_be_undone(built, tmp_path):
    again = tmp_path / "again.onnx"
    again.write_bytes(built.path.read_bytes())
    unpack(again)
    ours, theirs = onnx.load(again), onnx.load(built.padded)
    assert list(ours.graph.node) == list(theirs.graph.node)
    assert {item.name for item in ours.graph.initializer} == {item.name for item in theirs.graph.initializer}
    assert not [item for item in ours.metadata_props if item.key == PADDED]
    unpack(again)
    assert onnx.load(again) == ours


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_packed_up_to_their_pooling(tmp_path, pooling):
    built = packed(tiny_models.sentence_transformer(tmp_path / "source", pooling), tmp_path)
    assert built.notes["packed"], built.notes
    rows = sample_rows(built.reference, seed=3)
    assert distance(run(built.path, rows)[0], run(built.padded, rows)[0]) < TOLERANCE
    assert (1, rows.tokens) in {shape[:2] for shape in products(built.path, rows)}


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_int8_for_each_token_chooses_the_same_codes(known, tmp_path, name, calibrated):
    built = known[name]
    spec, sample = built.reference.tokenizer, sample_rows(built.reference)
    ranges = (sample_rows(built.reference, seed=5), spec) if calibrated else ()
    whole, path = tmp_path / "whole.onnx", tmp_path / "int8.onnx"
    quantize_rows_int8(built.padded, whole, *ranges)
    notes = pack(whole, path, sample, spec)
    assert notes["packed"], notes
    rows = sample_rows(built.reference, seed=6)
    # Another code would be seen: the first decimal places of a logit.
    assert distance(run(path, rows)[0], run(whole, rows)[0]) < TOLERANCE
    assert {shape[:2] for shape in products(path, rows) if len(shape) == 3} <= {(1, rows.tokens), (len(rows), 1)}


def test_padding_has_no_part_in_dynamic_ranges_any_more(known, tmp_path):
    built = known["bert"]
    whole, path = tmp_path / "whole.onnx", tmp_path / "int8.onnx"
    quantize_dynamic_int8(built.padded, whole)
    notes = pack(whole, path, sample_rows(built.reference), built.reference.tokenizer)
    assert notes["packed"], notes
    rows = sample_rows(built.reference, seed=6)
    assert distance(run(path, rows)[0], run(built.padded, rows)[0]) < 0.2
    kinds = {
        name for node in onnx.load(path).graph.node if node.op_type == "DynamicQuantizeLinear" for name in node.input
    }
    assert any(name.endswith("_packed") for name in kinds)


def test_a_graph_without_products_of_tokens_stays_as_it_is(known, tmp_path):
    source = graph_of(
        tmp_path / "small.onnx",
        [onnx.helper.make_node("Gather", ["hidden", "zero"], ["values"], axis=1)],
        {},
        {"values": 2},
    )
    reference = known["bert"].reference
    notes = pack(source, tmp_path / "packed.onnx", sample_rows(reference), reference.tokenizer)
    assert notes["packed"] == 0
    assert "no product" in notes["reason"]
    assert list(onnx.load(tmp_path / "packed.onnx").graph.node) == list(onnx.load(source).graph.node)
