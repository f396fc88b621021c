"""Every promised architecture through load, export, fuse, int8 and both engines, against transformers itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from fettle.manifest import Precision, Runtime, TaskKind, VariantManifest
from fettle.rows import Row, Rows
from optimize.checkpoint import save_checkpoint
from optimize.export import export_onnx
from optimize.fuse import fuse
from optimize.load import Reference, load_reference
from optimize.quantize import quantize_dynamic_int8
from tests.unit import tiny_models
from workers.engine import EngineOptions
from workers.onnx_encoder import OnnxEncoder
from workers.torch_encoder import TorchEncoder

TOLERANCE = 2e-5
# Rotary embeddings sit between the projections and the heads; DeBERTa and MPNet have relative positions of their own.
NOT_FUSED = {"modernbert", "deberta-v2", "mpnet"}
LENGTHS = [1, 2, 19, 36, 7, 36, 11, 3]


@dataclass(frozen=True)
class Built:
    reference: Reference
    source: Path
    directory: Path
    fuse_notes: dict


def sample_rows(reference: Reference, seed: int = 0, *, typed: bool = False) -> Rows:
    """Unequal rows of ordinary words; the second half of each in segment 1 if `typed`."""
    random = np.random.default_rng(seed)
    rows = []
    for length in (min(length, reference.tokenizer.max_length) for length in LENGTHS):
        ids = random.integers(len(tiny_models.SPECIAL), tiny_models.VOCABULARY, length).astype(np.int32)
        rows.append(Row(ids, (np.arange(length) > length // 2).astype(np.int8) if typed else None))
    return Rows.of(rows)


def manifest_of(reference: Reference, runtime: Runtime, precision: Precision) -> VariantManifest:
    return VariantManifest(
        id="v", runtime=runtime, precision=precision, recipe=[], tokenizer=reference.tokenizer, task=reference.task,
        files=[],
    )  # fmt: skip


def build(source: Path, directory: Path) -> Built:
    """The reference and its three variants, each in a directory of its own."""
    reference = load_reference(str(source))
    for name in ("torch", "fp32", "int8"):
        (directory / name).mkdir(parents=True)
    sample = sample_rows(reference)
    save_checkpoint(reference, directory / "torch", torch.float32)
    export_onnx(reference, directory / "plain.onnx", sample)
    notes = fuse(directory / "plain.onnx", directory / "fp32" / "model.onnx", sample, reference.tokenizer)
    quantize_dynamic_int8(directory / "fp32" / "model.onnx", directory / "int8" / "model.onnx")
    return Built(reference, source, directory, notes)


def expected_values(built: Built, rows: Rows) -> np.ndarray:
    """What transformers answers, loaded by its own classes: logits, or mean-pooled normalised vectors."""
    ids, mask, types = (torch.from_numpy(array) for array in rows.padded(tiny_models.PAD))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if built.reference.tokenizer.segments:
        inputs["token_type_ids"] = types
    classify = built.reference.task.kind is TaskKind.CLASSIFY
    factory = hf.AutoModelForSequenceClassification if classify else hf.AutoModel
    with torch.inference_mode():
        output = factory.from_pretrained(built.source).eval()(**inputs)
    if classify:
        return output.logits.numpy()
    inside = mask.unsqueeze(-1).float()
    vectors = (output.last_hidden_state * inside).sum(1) / inside.sum(1)
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


def answers(built: Built, name: str, rows: Rows) -> np.ndarray:
    if name == "torch":
        manifest = manifest_of(built.reference, Runtime.TORCH, Precision.FP32)
        engine = TorchEncoder(built.directory / name, manifest, EngineOptions())
    else:
        precision = Precision.INT8 if name == "int8" else Precision.FP32
        engine = OnnxEncoder(
            built.directory / name, manifest_of(built.reference, Runtime.ONNX, precision), EngineOptions()
        )
    engine.warm_up()
    values = engine.run(rows).values
    engine.close()
    return values


@pytest.fixture(scope="module", params=tiny_models.CLASSIFIERS)
def built(request, tmp_path_factory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    return build(tiny_models.classifier(folder / "source", request.param), folder)


def distance(values, expected) -> float:
    assert values.dtype == np.float32
    assert values.shape == expected.shape
    return float(np.abs(values - expected).max() / max(1.0, np.abs(expected).max()))


def test_engines_equal_transformers_in_unequal_batches(built):
    rows = sample_rows(built.reference, seed=1)
    expected = expected_values(built, rows)
    assert expected.std() > 0.05, "the tiny model answers the same whatever it reads; the comparison would be empty"
    assert distance(answers(built, "torch", rows), expected) < TOLERANCE
    assert distance(answers(built, "fp32", rows), expected) < TOLERANCE


def test_segments_reach_the_model_where_it_reads_them(built):
    typed = sample_rows(built.reference, seed=1, typed=True)
    plain = Rows(typed.ids, typed.lengths)
    expected = expected_values(built, typed)
    assert distance(answers(built, "fp32", typed), expected) < TOLERANCE
    assert (distance(expected_values(built, plain), expected) > 1e-3) == built.reference.tokenizer.segments


def test_rows_do_not_depend_on_their_batch(built):
    rows = sample_rows(built.reference, seed=2)
    together = answers(built, "fp32", rows)
    ends = np.cumsum(rows.lengths)
    for index, length in enumerate(rows.lengths):
        alone = Rows(rows.ids[ends[index] - length : ends[index]], rows.lengths[index : index + 1])
        assert distance(answers(built, "fp32", alone), together[index : index + 1]) < TOLERANCE


def test_int8_stays_near(built):
    rows = sample_rows(built.reference, seed=3)
    expected = expected_values(built, rows)
    values = answers(built, "int8", rows)
    assert np.isfinite(values).all()
    # Layers of 32 wide-spread weights are the worst case for 8 bits; garbage would be off by the spread itself.
    assert np.abs(values - expected).mean() < 0.35 * expected.std()


def test_attention_is_fused_where_it_can_be(built):
    name = built.reference.config.model_type
    assert built.fuse_notes["attention_fused"] == (0 if name in NOT_FUSED else 2)


@pytest.mark.parametrize(
    ("problem", "width", "head"),
    [("multi_label_classification", 3, "multi_label"), (None, 1, "regression"), ("regression", 2, "regression")],
)
def test_other_heads(tmp_path, problem, width, head):
    built = build(tiny_models.classifier(tmp_path / "source", problem=problem, width=width), tmp_path)
    rows = sample_rows(built.reference, seed=1)
    assert built.reference.task.head == head
    assert distance(answers(built, "fp32", rows), expected_values(built, rows)) < TOLERANCE


def test_bare_encoder_is_pooled_and_normalised(tmp_path):
    built = build(tiny_models.encoder(tmp_path / "source", "distilbert"), tmp_path)
    rows = sample_rows(built.reference, seed=1)
    expected = expected_values(built, rows)
    assert distance(answers(built, "torch", rows), expected) < TOLERANCE
    assert distance(answers(built, "fp32", rows), expected) < TOLERANCE


@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_poolings_in_both_engines(tmp_path, pooling):
    built = build(tiny_models.sentence_transformer(tmp_path / "source", pooling, normalize=False), tmp_path)
    rows = sample_rows(built.reference, seed=1)
    assert built.reference.task.pooling == pooling
    assert distance(answers(built, "fp32", rows), answers(built, "torch", rows)) < TOLERANCE
