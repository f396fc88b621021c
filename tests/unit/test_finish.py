"""What comes after the variants: points tried on test, levels without one, what is set aside, the time budget."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fettle.answers import EMBEDDING_COSINE_FLOOR
from fettle.cli import app
from fettle.config import DataFiles, OptimizeConfig
from fettle.errors import PassError
from fettle.family import MANIFEST_FILE, Family, check_files, variant_directory
from fettle.manifest import VariantManifest
from fettle.store import sha256_file
from optimize import finish, measure, pipeline, recipes
from optimize.data import load_splits
from optimize.finish import DROPPED_FOLDER
from optimize.progress import Progress
from optimize.workspace import Work
from tests.fake_optimize import (
    FakeReference,
    config_for,
    fake_pass,
    fake_recipe,
    install,
    run,
    write_data,
)
from tests.fakes import FakeVariant, embed_task, make_fake_family

# Costs a row: 1 ms for the cheap one, and so much more for the others.
CHEAP = fake_recipe("cheap")
REFERENCE = fake_recipe(recipes.REFERENCE, fake_pass(recipes.REFERENCE, ms_per_call=0.1), parent=None)
ONNX = fake_recipe(recipes.ONNX_REFERENCE, fake_pass(recipes.ONNX_REFERENCE, ms_per_call=0.05))
POOR = fake_recipe("poor", fake_pass("as poor as can be", ms_per_call=0.2))
LEVELS = [0.001, 0.1, 0.2]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OptimizeConfig:
    install(monkeypatch, [REFERENCE, ONNX, POOR, CHEAP])
    return config_for(tmp_path, levels=LEVELS)


def split_files(directory: Path, *names: str) -> DataFiles:
    return DataFiles(
        **{name: write_data(directory / f"{name}.jsonl", 100, start=1000 * number) for number, name in enumerate(names)}
    )


# Operating points.


def test_points_are_certified_and_tried_on_test(config: OptimizeConfig) -> None:
    family = run(config)
    none, *some = family.manifest.levels
    assert [level.alpha for level in family.manifest.levels] == LEVELS
    assert none.point is None
    assert none.rows_needed == 2995  # ln 0.05 / ln 0.999
    assert "calibration rows are too few" in str(none.reason)
    assert [level.point for level in some] == [point.id for point in family.manifest.points]
    test = family.manifest.data["test"].rows
    for point in family.manifest.points:
        assert point.certificate.errors == 0
        assert point.certificate.p_value == pytest.approx((1 - point.certificate.alpha) ** point.certificate.rows)
        assert point.certificate.p_value <= 0.05
        found = point.test
        assert found is not None
        assert (found.rows, found.errors, found.disagreement) == (test, 0, 0.0)
        assert sum(share for step in found.answered for share in step) == pytest.approx(1.0)
        assert [len(step) for step in found.answered] == [len(step.gates) for step in point.steps]
        assert (len(found.scores), sum(found.scores)) == (20, test)
        assert found.metric_name == "accuracy"
        assert found.cpu_ms_per_row > 0
        assert found.reference_cpu_ms_per_row > 0
    assert [step.variant for step in family.manifest.points[-1].steps] == ["cheap"]


def test_the_report_has_figures_by_label_and_by_score(config: OptimizeConfig) -> None:
    analysis = run(config).manifest.analysis
    assert {label for item in analysis.labels for label in item.changed} == {"within-0.1", "within-0.2"}
    assert all(share == 0 for item in analysis.labels for share in item.changed.values())
    assert {item.variant for item in analysis.scores} >= {"cheap", recipes.ONNX_REFERENCE}
    assert any("within" in note or "%" in note for note in analysis.notes)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (("test",), "validation"),
        (("validation", "test"), "calibration"),
        (("train", "calibration", "test"), "validation"),
    ],
)
def test_without_the_splits_each_level_says_which_one_is_missing(
    tmp_path: Path, config: OptimizeConfig, given: tuple[str, ...], missing: str
) -> None:
    family = run(config.model_copy(update={"files": split_files(tmp_path, *given)}))
    assert family.verify() == []
    assert family.manifest.points == []
    assert [level.alpha for level in family.manifest.levels] == LEVELS
    for level in family.manifest.levels:
        assert level.point is None
        assert f"no {missing} split" in str(level.reason)
        assert f"--{missing}" in str(level.reason)


def test_without_the_onnx_reference_each_level_says_so(config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE, CHEAP])
    family = run(config)
    assert all("onnx-fp32 could not be made" in str(level.reason) for level in family.manifest.levels)


def test_a_variant_that_cannot_be_traced_is_left_out_of_the_points(
    config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measure.try_rows

    def failing(request: Any, rows: Any, report: Any) -> Any:
        if request.variant.name == "cheap" and any(part.name.startswith("calibration") for part in request.parts):
            raise PassError("its process was killed by SIGKILL")
        return real(request, rows, report)

    monkeypatch.setattr(measure, "try_rows", failing)
    said: list[str] = []
    family = run(config, said.append)
    assert "cheap is left out of the operating points: its process was killed by SIGKILL" in said[0]
    assert family.manifest.points
    assert "cheap" not in {step.variant for point in family.manifest.points for step in point.steps}


def test_points_that_cannot_be_tried_keep_their_certificates(
    config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measure.run_child

    def failing(module: str, folder: Path, report: Any) -> None:
        if module == "optimize.point_trial":
            raise PassError("its process was killed by SIGKILL")
        real(module, folder, report)

    monkeypatch.setattr(measure, "run_child", failing)
    said: list[str] = []
    family = run(config, said.append)
    assert f"{finish.TRY_POINTS}: its process was killed by SIGKILL" in said[0]
    assert family.verify() == []
    assert [point.test for point in family.manifest.points] == [None, None]


def test_a_second_run_traces_and_certifies_from_what_is_there(
    config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(config).manifest

    def never(*_: Any) -> None:
        raise AssertionError("a variant was run again")

    monkeypatch.setattr(measure, "try_rows", never)
    again = run(config).manifest
    assert again.levels == first.levels
    without = {"test": None}
    assert [point.model_copy(update=without) for point in again.points] == [
        point.model_copy(update=without) for point in first.points
    ]


def test_other_levels_need_no_new_traces(config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    monkeypatch.setattr(measure, "try_rows", None)
    family = run(config.model_copy(update={"levels": [0.3], "delta": 0.01}))
    (point,) = family.manifest.points
    assert (point.certificate.alpha, point.certificate.delta) == (0.3, 0.01)


def test_other_calibration_rows_are_traced(tmp_path: Path, config: OptimizeConfig) -> None:
    files = split_files(tmp_path, "train", "validation", "calibration", "test")
    before = run(config.model_copy(update={"files": files})).manifest
    write_data(tmp_path / "calibration.jsonl", 80, start=9000)
    after = run(config.model_copy(update={"files": files})).manifest
    assert before.points[0].certificate.rows != after.points[0].certificate.rows
    assert after.points[0].certificate.rows == after.data["calibration"].rows


# What is set aside.


def test_what_is_dominated_is_set_aside_and_taken_back_by_the_next_run(config: OptimizeConfig) -> None:
    family = run(config)
    (dropped,) = family.manifest.dropped
    assert dropped.id == "poor"
    assert dropped.reason == "cheap is at least as good in every respect"
    assert "poor" not in family.variants
    home, aside = variant_directory(config.out, "poor"), config.out / DROPPED_FOLDER / "poor"
    assert [path.name for path in home.iterdir()] == [MANIFEST_FILE]
    assert sha256_file(home / MANIFEST_FILE) == dropped.manifest_sha256
    files = VariantManifest.model_validate_json((home / MANIFEST_FILE).read_bytes()).files
    assert check_files(aside, files) == []
    written = (aside / "weights.bin").stat().st_mtime_ns
    said: list[str] = []
    assert run(config, said.append).manifest.dropped == [dropped]
    assert "build poor (already there" in said[0]
    assert "measure poor (already done" in said[0]
    assert (aside / "weights.bin").stat().st_mtime_ns == written


def test_what_is_not_dominated_any_more_comes_back(config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    # Without the one that beat it, it is smaller than nothing else, but cheaper than the slow reference.
    slow = fake_recipe(recipes.ONNX_REFERENCE, fake_pass(recipes.ONNX_REFERENCE, ms_per_call=0.5))
    install(monkeypatch, [fake_recipe(recipes.REFERENCE, fake_pass("x", ms_per_call=0.5), parent=None), slow, POOR])
    family = run(config)
    assert "poor" in family.variants
    assert family.verify() == []
    assert not list((config.out / DROPPED_FOLDER).glob("*"))


def test_what_was_set_aside_of_a_variant_that_is_gone_is_deleted(tmp_path: Path) -> None:
    aside = tmp_path / DROPPED_FOLDER / "gone"
    aside.mkdir(parents=True)
    (aside / "weights.bin").write_bytes(b"w")
    finish.restore_dropped(tmp_path)
    assert not aside.exists()
    assert not (tmp_path / "variants").exists()


def test_a_damaged_file_that_was_set_aside_is_made_again(config: OptimizeConfig) -> None:
    run(config)
    (config.out / DROPPED_FOLDER / "poor" / "weights.bin").write_bytes(b"damaged")
    said: list[str] = []
    family = run(config, said.append)
    assert "build poor (already there" not in said[0]
    assert [item.id for item in family.manifest.dropped] == ["poor"]
    assert (config.out / DROPPED_FOLDER / "poor" / "weights.bin").read_bytes() == b"as poor as can be" * 1000


# The default and the name.


def measured(tmp_path: Path, *variants: FakeVariant) -> list[VariantManifest]:
    return list(make_fake_family(tmp_path / "f", variants=variants).variants.values())


def test_the_default_is_the_fastest_exact_one(tmp_path: Path) -> None:
    variants = measured(
        tmp_path,
        FakeVariant("original", ms_per_token=4),
        FakeVariant("exact", ms_per_token=2),
        FakeVariant("slower", ms_per_token=3),
        FakeVariant("wrong", ms_per_token=1, disagreement=0.01),
        FakeVariant("fickle", ms_per_token=1, invariant=False),
    )
    assert finish.default_variant(variants, "original") == "exact"


def test_the_reference_is_the_default_where_nothing_faster_is_exact(tmp_path: Path) -> None:
    variants = measured(
        tmp_path,
        FakeVariant("original", ms_per_token=4, invariant=False),
        FakeVariant("wrong", ms_per_token=1, disagreement=0.01),
    )
    assert finish.default_variant(variants, "original") == "original"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/My-Model_v1.2", "My-Model_v1.2"),
        ("org/ünï code", "n--code"),
        ("...", "model"),
        ("a/" + "x" * 99, "x" * 64),
    ],
)
def test_the_family_is_named_after_the_model(model: str, name: str) -> None:
    assert finish.default_name(model) == name


# The command that makes it again.


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> OptimizeConfig:
    """The configuration that the command line makes of these words."""
    seen: list[OptimizeConfig] = []

    def keep(config: OptimizeConfig, progress: Progress) -> Family:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", keep)
    program, *arguments = shlex.split(command)
    assert program == "fettle"
    done = CliRunner().invoke(app, arguments)
    assert seen, done.stderr
    return seen[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"files": {"data": "my texts.jsonl", "text_column": "the body", "pair_column": "q", "label_column": "y"}},
        {"files": {name: f"{name}.csv" for name in ("train", "validation", "calibration", "test")}},
        {
            "name": "n",
            "task": "classify",
            "recipes": ["onnx-int8", "torch-bf16"],
            "effort": "standard",
            "time_budget_minutes": 12.5,
            "levels": [0.01, 0.3],
            "delta": 0.1,
            "cosine_floor": 0.9,
            "threads": 2,
            "max_rows": 77,
            "seed": 5,
        },
        {"levels": [0.02]},
    ],
    ids=["defaults", "one file", "four files", "everything", "one level"],
)
def test_the_command_parses_back_to_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    values = {"model": "org/a model", "out": "out dir", "files": {"data": "d.jsonl"}, **changes}
    config = OptimizeConfig.model_validate(values)
    splits = load_splits(DataFiles(data=write_data(tmp_path / "d.jsonl")))
    work = Work(config, Progress(), FakeReference(), splits)  # type: ignore[arg-type]
    assert parsed(finish.command_of(work), monkeypatch) == config


def test_every_setting_has_an_option_or_is_no_part_of_what_is_made() -> None:
    assert set(OptimizeConfig.model_fields) - set(finish.OPTIONS) == {"model", "files", "remeasure"}


def test_the_family_holds_the_command(config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    family = run(config)
    assert parsed(family.manifest.command, monkeypatch) == config


# The time budget.


def test_recipes_that_do_not_fit_the_time_are_listed_and_the_rest_is_finished(
    config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = fake_recipe("long", replace(fake_pass("long"), expected_seconds=3600))
    install(monkeypatch, [REFERENCE, ONNX, long, fake_recipe("of-long", parent="long"), CHEAP])
    said: list[str] = []
    family = run(config.model_copy(update={"time_budget_minutes": 20}), said.append)
    assert list(family.variants) == [recipes.REFERENCE, recipes.ONNX_REFERENCE, "cheap"]
    assert {item.id: item.reason for item in family.manifest.not_built} == {
        "long": "the time budget does not allow it",
        "of-long": "long, which it is made from, failed",
    }
    assert "build long: the time budget does not allow it" in said[0]
    assert family.manifest.points


def test_in_no_time_at_all_there_are_the_references_and_their_points(config: OptimizeConfig) -> None:
    family = run(config.model_copy(update={"time_budget_minutes": 0.01}))
    assert list(family.variants) == [recipes.REFERENCE, recipes.ONNX_REFERENCE]
    assert [item.id for item in family.manifest.not_built] == ["poor", "cheap"]
    assert all("time budget" in item.reason for item in family.manifest.not_built)
    assert family.verify() == []


def test_a_run_without_a_budget_completes_one_with(config: OptimizeConfig) -> None:
    run(config.model_copy(update={"time_budget_minutes": 0.01}))
    family = run(config)
    assert "cheap" in family.variants
    assert family.manifest.not_built == []


# Vectors have no scores, so a point is one variant.


def test_vectors_are_certified_by_their_cosine(config: OptimizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = embed_task(8).model_copy(update={"normalized": False})
    monkeypatch.setattr(pipeline, "load_reference", lambda source, task=None: FakeReference(task=vectors))
    family = run(config.model_copy(update={"cosine_floor": 0.9}))
    assert family.manifest.cosine_floor == 0.9 != EMBEDDING_COSINE_FLOOR
    assert [len(point.steps) for point in family.manifest.points] == [1, 1]
    assert family.manifest.points[-1].steps[0].variant == "cheap"
    assert family.manifest.analysis.labels == []
    overlap = family.manifest.analysis.top10_overlap
    assert set(overlap) == {recipes.REFERENCE, recipes.ONNX_REFERENCE, "poor", "cheap"}
    assert np.allclose(list(overlap.values()), 1.0)
