"""Students of every architecture: made without touching the reference, written, built again, exported."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from fettle.errors import FamilyError, PassError
from fettle.manifest import Precision, Runtime
from fettle.rows import Rows
from optimize.anatomy import dissect
from optimize.export import check_batches, export_onnx, run_graph
from optimize.fuse import fuse
from optimize.load import load_reference
from optimize.quantize import quantize_dynamic_int8
from optimize.student import (
    FactorizeEmbeddings,
    KeepLayers,
    PruneHeads,
    PruneNeurons,
    Shape,
    ShareLayers,
    ShrinkWidth,
    load_student,
    make_student,
    parameters,
    save_student,
)
from tests.unit import tiny_models
from tests.unit.test_architectures import NOT_FUSED, distance, manifest_of, sample_rows
from tests.unit.tiny_encoders import ARCHITECTURES
from workers.engine import EngineOptions
from workers.onnx_encoder import OnnxEncoder

DEPTH = 3
TOLERANCE = 2e-5


def uneven(name):
    """Two layers of three, with 3 and 2 heads, 32 and 16 neurons; ALBERT's layers are one and cannot differ."""
    heads, neurons = [[0, 1, 3], [0, 2]], [list(range(32)), list(range(0, 48, 3))]
    if name == "albert":
        heads, neurons = heads[:1] * 2, neurons[:1] * 2
    return [KeepLayers(layers=[0, 2]), PruneHeads(keep=heads), PruneNeurons(keep=neurons)]


RESHAPED = [FactorizeEmbeddings(rank=6), ShrinkWidth(hidden=24), ShareLayers(source=1)]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """One classifier of three layers for each architecture, loaded as a user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.SIZES, "num_hidden_layers", DEPTH)
        patch.setitem(tiny_models.DISTILBERT_SIZES, "n_layers", DEPTH)
        folder = tmp_path_factory.mktemp("references")
        return {
            name: load_reference(str(tiny_models.classifier(folder / name, name))) for name in tiny_models.CLASSIFIERS
        }


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return load_reference(str(tiny_models.sentence_transformer(tmp_path_factory.mktemp("embedder"))))


def outputs(scorer, reference):
    batches = check_batches(sample_rows(reference, seed=1), reference.tokenizer)
    with torch.inference_mode():
        return [scorer(*(torch.from_numpy(array) for array in batch.values())) for batch in batches]


def equal(ours, theirs):
    return all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))


each = pytest.mark.parametrize("name", ARCHITECTURES)


@each
def test_a_saved_student_is_built_again_bit_by_bit(references, name, tmp_path):
    reference = references[name]
    before = outputs(reference.model, reference)
    for index, operations in enumerate([[], uneven(name), RESHAPED, uneven(name) + RESHAPED]):
        student = make_student(reference, operations)
        # As after training: no weight can be had from the reference.
        with torch.no_grad():
            for weight in student.parameters():
                weight.mul_(1.25)
        save_student(student, operations, tmp_path / str(index), reference.config)
        again = load_student(tmp_path / str(index), reference.task)
        assert equal(outputs(again, reference), outputs(student, reference))
        assert parameters(again) == parameters(student)
        assert not again.training
    assert equal(outputs(reference.model, reference), before)
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == [
        "config.json",
        "model.safetensors",
        "shape.json",
    ]


def test_an_embedding_student_too(embedder, tmp_path):
    student = make_student(embedder, [KeepLayers(layers=[0]), ShrinkWidth(hidden=16)])
    save_student(student, [KeepLayers(layers=[0]), ShrinkWidth(hidden=16)], tmp_path, embedder.config)
    again = load_student(tmp_path, embedder.task)
    assert equal(outputs(again, embedder), outputs(student, embedder))
    assert outputs(again, embedder)[0].shape[1] == embedder.task.width


def test_shared_weights_are_written_once(references, tmp_path):
    reference = references["bert"]
    for name, operations in (("whole", []), ("shared", [ShareLayers(source=1)])):
        save_student(make_student(reference, operations), operations, tmp_path / name, reference.config)
    layer = sum(weight.numel() for weight in dissect(reference.model).layers[0].module.parameters())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "shared")]
    assert sizes[0] - sizes[1] > 2 * 4 * layer


def test_loading_leaves_the_random_numbers_alone(references, tmp_path):
    save_student(make_student(references["bert"], []), [], tmp_path, references["bert"].config)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_student(tmp_path, references["bert"].task)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("shape.json", lambda data: b"{}"),
        ("shape.json", lambda data: b'{"operations": [{"kind": "melt"}]}'),
        ("shape.json", lambda data: b'{"operations": [{"kind": "keep_layers", "layers": [0]}]}'),
        ("shape.json", lambda data: b'{"operations": [{"kind": "keep_layers", "layers": [9]}]}'),
        ("model.safetensors", lambda data: data[:100]),
        ("config.json", lambda data: b"{"),
    ],
)
def test_damaged_students_are_refused(references, tmp_path, file, damage):
    operations = [KeepLayers(layers=[0, 1])]
    save_student(make_student(references["bert"], operations), operations, tmp_path, references["bert"].config)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(FamilyError, match="student"):
        load_student(tmp_path, references["bert"].task)


def test_operations_are_read_back_with_every_parameter():
    operations = [*uneven("bert"), *RESHAPED]
    text = Shape(operations=operations).model_dump_json()
    assert Shape.model_validate_json(text).operations == operations
    kinds = [operation["kind"] for operation in json.loads(text)["operations"]]
    assert kinds == [
        "keep_layers",
        "prune_heads",
        "prune_neurons",
        "factorize_embeddings",
        "shrink_width",
        "share_layers",
    ]


def test_an_operation_that_does_not_fit_says_so(references):
    with pytest.raises(PassError, match="layers"):
        make_student(references["bert"], [KeepLayers(layers=[0, 3])])


# Export.


def exported(reference, student, folder):
    """The student as a fused graph and as int8, and what fusion counted."""
    sample = sample_rows(reference)
    shaped = dataclasses.replace(reference, model=student)
    (folder / "int8").mkdir()
    export_onnx(shaped, folder / "plain.onnx", sample)
    notes = fuse(folder / "plain.onnx", folder / "model.onnx", sample, reference.tokenizer)
    quantize_dynamic_int8(folder / "model.onnx", folder / "int8" / "model.onnx")
    return notes


def check_export(reference, student, folder):
    notes = exported(reference, student, folder)
    rows = sample_rows(reference, seed=1)
    batches = check_batches(rows, reference.tokenizer)
    expected = [values.numpy() for values in outputs(student, reference)]
    for values, wanted in zip(run_graph(folder / "model.onnx", batches), expected, strict=True):
        assert distance(values, wanted) < TOLERANCE
    engine = OnnxEncoder(folder / "int8", manifest_of(reference, Runtime.ONNX, Precision.INT8), EngineOptions())
    values = engine.run(Rows(rows.ids, rows.lengths)).values
    engine.close()
    assert np.abs(values - expected[-1]).mean() < 0.4 * max(expected[-1].std(), 0.1)
    return notes


# Exports take seconds each. MPNet is the one whose attention is a module of Fettle's after pruning.
QUICK = {"bert", "mpnet"}
exports = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)


@exports
def test_pruned_and_shortened_students_export(references, name, tmp_path):
    student = make_student(references[name], uneven(name))
    notes = check_export(references[name], student, tmp_path)
    assert notes["attention_fused"] == (0 if name in NOT_FUSED else 2)


@pytest.mark.slow
@each
def test_reshaped_students_export(references, name, tmp_path):
    student = make_student(references[name], RESHAPED)
    notes = check_export(references[name], student, tmp_path)
    assert notes["attention_fused"] == (0 if name in NOT_FUSED else DEPTH)


@pytest.mark.slow
def test_narrow_embedding_students_export(embedder, tmp_path):
    student = make_student(embedder, [ShrinkWidth(hidden=16)])
    check_export(embedder, student, tmp_path)
