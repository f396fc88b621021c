"""`fettle optimize` from end to end on a tiny real model: every pass that a CPU can run, nothing faked."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fettle.cli import app
from fettle.family import Family
from fettle.manifest import VariantManifest
from optimize import measure, recipes, train
from tests.unit import tiny_models

LEVELS = [0.001, 0.1, 0.2]
QUICK = {"torch-fp32", "torch-bf16", "onnx-fp32", "onnx-fp32-trim", "onnx-int8-dynamic", "exits-frozen-int8"}
STANDARD = QUICK | {
    "pruned-layers-1-int8",
    "distilled-1-int8",
    "pruned-widths-60-int8",
    "shared-layers-int8",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of two layers and 300 rows of words; the labels are noise."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "model").mkdir()
    tiny_models.classifier(directory / "model")
    dice = random.Random(0)
    rows = [
        {
            "text": " ".join(dice.choices(tiny_models.WORDS, k=dice.randint(3, 12))),
            "label": dice.choice(tiny_models.LABELS),
        }
        for _ in range(300)
    ]
    (directory / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    """Latency tables of a few cells, and no second core for a model that is too small for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "LATENCY_SECONDS", 0.1)
        patch.setattr(train, "usable_cores", lambda: 1)
        yield


def optimize(directory: Path, out: Path, *options: str) -> Family:
    levels = [word for level in LEVELS for word in ("--level", str(level))]
    where = ["--data", str(directory / "texts.jsonl"), "--out", str(out)]
    done = CliRunner().invoke(app, ["optimize", str(directory / "model"), *where, *levels, *options])
    assert done.exit_code == 0, done.stderr
    return Family.open(out)


def made(family: Family) -> dict[str, VariantManifest]:
    """All that was built and measured, what was set aside too."""
    dropped = {
        item.id: VariantManifest.model_validate_json(
            (family.directory / "variants" / item.id / "manifest.json").read_bytes()
        )
        for item in family.manifest.dropped
    }
    return {**family.variants, **dropped}


def check_whole(family: Family) -> None:
    assert family.verify() == []
    assert {item.id for item in family.manifest.not_built} == {item.id for item in recipes.unavailable()}
    assert all(variant.measured is not None for variant in made(family).values())
    refused, *promised = family.manifest.levels
    assert refused.point is None
    assert refused.rows_needed == 2995  # ln 0.05 / ln 0.999
    assert [level.point for level in promised] == [point.id for point in family.manifest.points]
    for point in family.manifest.points:
        assert point.certificate.upper_bound <= point.certificate.alpha
        assert point.test is not None
        assert point.test.rows == family.manifest.data["test"].rows
    assert len(family.manifest.analysis.layer_influence) == 2
    report = (family.directory / "report.html").read_text()
    assert all(point.id in report for point in family.manifest.points)


def test_quick(directory: Path, tmp_path: Path) -> None:
    family = optimize(directory, tmp_path / "family")
    check_whole(family)
    assert made(family).keys() >= QUICK
    staged = made(family)["exits-frozen-int8"]
    assert [stage.layers for stage in staged.stages] == [1, 2]


@pytest.mark.slow
def test_standard(directory: Path, tmp_path: Path) -> None:
    family = optimize(directory, tmp_path / "family", "--effort", "standard")
    check_whole(family)
    assert made(family).keys() >= STANDARD
    passes = {record.name for variant in made(family).values() for record in variant.recipe}
    assert passes >= {
        *("checkpoint", "export", "export-stages", "fuse", "first-token", "quantize", "quantize-embeddings", "split"),
        *("exit-heads", "distill", "prune-layers", "keep-alternate-layers", "prune-heads-and-neurons", "share-layers"),
    }
