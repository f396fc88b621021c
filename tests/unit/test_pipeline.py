"""The pipeline around the passes: what is reused, what is redone, and what a failure costs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fettle.config import DataFiles
from fettle.errors import BusyError, DataError, PassError
from fettle.family import Family
from fettle.rows import Row
from fettle.store import locked
from optimize import hardware, measure, recipes
from optimize.progress import Progress
from tests.fake_optimize import (
    REFERENCE,
    FakeReference,
    config_for,
    failing_pass,
    fake_pass,
    fake_recipe,
    install,
    run,
    write_data,
)

CHEAP = fake_recipe("cheap")
CHILD = fake_recipe("child", parent="cheap")


def when(directory: Path) -> dict[str, int]:
    """When each file below was last written; the identity of what a run left alone."""
    return {
        str(path.relative_to(directory)): path.stat().st_mtime_ns
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_run_makes_an_intact_and_measured_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE, CHEAP, CHILD])
    family = run(config_for(tmp_path, name="colours"))
    assert family.verify() == []
    assert family.name == "colours"
    assert list(family.variants) == ["torch-fp32", "cheap", "child"]
    assert family.variant("child").parent == "cheap"
    assert family.manifest.data["test"].labelled
    for variant in family.variants.values():
        assert variant.measured is not None
        assert variant.measured.quality.disagreement == 0
        assert variant.measured.quality.metric_name == "accuracy"
        assert variant.resources.memory_bytes == variant.measured.peak_memory_bytes
        assert variant.recipe[0].notes == {"bytes": len(variant.id) * 1000} or variant.id == "torch-fp32"


def test_quality_uses_at_most_the_rows_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE])
    found = run(config_for(tmp_path, max_rows=20)).variant("torch-fp32").measured
    assert found is not None
    assert found.quality.rows == 20


def test_a_second_run_changes_nothing_but_family_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE, CHEAP])
    config = config_for(tmp_path)
    before = run(config).manifest
    times = when(config.out)
    said: list[str] = []
    after = run(config, said.append).manifest
    assert after == before
    assert {name for name, time in when(config.out).items() if time != times[name]} == {"family.json", "report.html"}
    assert said[0].count("already") == 4


def test_a_changed_recipe_is_redone_with_its_children_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path)
    install(monkeypatch, [REFERENCE, CHEAP, CHILD])
    run(config)
    times = when(config.out)
    install(monkeypatch, [REFERENCE, fake_recipe("cheap", fake_pass("cheap", ms_per_call=0.1)), CHILD])
    assert run(config).verify() == []
    changed = {name for name, time in when(config.out).items() if time != times.get(name)}
    redone = {name.split("/")[1] for name in changed if name.startswith("variants/")}
    assert redone == {"cheap", "child"}


def test_new_test_rows_are_measured_without_building_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE, CHEAP])
    config = config_for(tmp_path)
    before = run(config)
    times = when(config.out)
    write_data(tmp_path / "data.jsonl", 500, start=50)
    after = run(config)
    assert after.verify() == []
    for name in ("torch-fp32", "cheap"):
        file = f"variants/{name}/weights.bin"
        assert when(config.out)[file] == times[file]
        assert before.variant(name).measured != after.variant(name).measured


def test_measuring_again_on_request_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE, CHEAP])
    config = config_for(tmp_path)
    run(config)
    times = when(config.out)
    run(config.model_copy(update={"remeasure": True}))
    changed = {name for name, time in when(config.out).items() if time != times[name]}
    manifests = {f"variants/{name}/manifest.json" for name in ("cheap", "torch-fp32")}
    assert changed == {"family.json", "report.html"} | manifests


def test_a_busy_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE])
    monkeypatch.setattr(hardware, "busy_share", lambda: 0.9)
    said: list[str] = []
    run(config_for(tmp_path), said.append)
    assert "90%" in said[0]
    assert "--remeasure" in said[0]


@pytest.mark.parametrize("damage", ["flip", "delete", "manifest", "foreign"])
def test_a_damaged_variant_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    install(monkeypatch, [REFERENCE, CHEAP])
    config = config_for(tmp_path)
    run(config)
    weights, manifest = (config.out / "variants" / "cheap" / name for name in ("weights.bin", "manifest.json"))
    match damage:
        case "flip":
            weights.write_bytes(b"X" + weights.read_bytes()[1:])
        case "delete":
            weights.unlink()
        case "manifest":
            manifest.write_text("{}")
        case "foreign":
            manifest.write_text(manifest.read_text().replace('"parent"', '"stranger": 1, "parent"', 1))
    assert run(config).verify() == []


def test_a_failed_pass_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = fake_recipe("bad", failing_pass(RuntimeError("no kernel for this\nand a long trace")))
    install(monkeypatch, [REFERENCE, bad, fake_recipe("of-bad", parent="bad"), CHEAP])
    said: list[str] = []
    family = run(config_for(tmp_path), said.append)
    assert list(family.variants) == ["torch-fp32", "cheap"]
    assert {item.id: item.reason for item in family.manifest.not_built} == {
        "bad": "fails: no kernel for this",
        "of-bad": "bad, which it is made from, failed",
    }
    assert "no kernel for this" in said[0]
    assert not (family.directory / "variants" / "bad").exists()
    assert family.verify() == []


def test_a_variant_that_crashes_while_it_is_measured_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = fake_recipe("bad", fake_pass("bad", exit_on_token=2))  # [CLS] is in every row
    install(monkeypatch, [REFERENCE, bad, CHEAP], in_process=False)
    family = run(config_for(tmp_path))
    assert list(family.variants) == ["torch-fp32", "cheap"]
    (missing,) = family.manifest.not_built
    assert missing.id == "bad"
    assert missing.reason.startswith("measuring failed: its process ended with status 70")


def test_the_reference_failing_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [fake_recipe("torch-fp32", failing_pass(RuntimeError("broken")), parent=None), CHEAP])
    with pytest.raises(PassError, match="broken"):
        run(config_for(tmp_path))
    assert not (tmp_path / "family" / "family.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_locked_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    full = fake_recipe("full", failing_pass(OSError(number, os.strerror(number), "model.onnx")))
    install(monkeypatch, [REFERENCE, full, CHEAP])
    with pytest.raises(OSError, match=r"model\.onnx") as caught:
        run(config_for(tmp_path))
    assert caught.value.errno == number
    assert not list((tmp_path / "family").rglob(".tmp-*"))


def test_a_full_disk_ends_the_run_whatever_it_is_wrapped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = PassError("the export failed")
    wrapped.__cause__ = RuntimeError("the exporter gave up")
    wrapped.__cause__.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    install(monkeypatch, [REFERENCE, fake_recipe("full", failing_pass(wrapped)), CHEAP])
    with pytest.raises(OSError, match="No space left") as caught:
        run(config_for(tmp_path))
    # What did not say where it happened names the family's directory.
    assert caught.value.filename == str(tmp_path / "family")
    assert not list((tmp_path / "family").rglob(".tmp-*"))
    assert not (tmp_path / "family" / "family.json").exists()


def test_an_interrupt_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path)
    interrupted = fake_recipe("cheap", fake_pass("cheap"), failing_pass(KeyboardInterrupt()))  # type: ignore[arg-type]
    install(monkeypatch, [REFERENCE, interrupted])
    with pytest.raises(KeyboardInterrupt):
        run(config)
    times = when(config.out)
    install(monkeypatch, [REFERENCE, CHEAP])
    assert run(config).verify() == []
    assert when(config.out)["variants/torch-fp32/weights.bin"] == times["variants/torch-fp32/weights.bin"]


def test_a_directory_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE])
    config = config_for(tmp_path)
    with locked(config.out), pytest.raises(BusyError, match="another fettle run"):
        run(config)


def test_unknown_labels_are_warned_about_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE])
    data = write_data(tmp_path / "data.jsonl")
    data.write_text(data.read_text().replace('"red"', '"pink"'))
    said: list[str] = []
    found = run(config_for(tmp_path), said.append).variant("torch-fp32").measured
    assert "labels that the model does not know" in said[0]
    assert "'pink'" in said[0]
    assert found is not None
    assert found.quality.metric_name == "accuracy"


def test_one_answer_for_all_rows_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE])

    def always_red(reference: FakeReference, rows: list[Row], report: Any) -> Any:
        return np.tile(np.array([1, 0, 0], np.float32), (len(rows), 1))

    said: list[str] = []
    run(config_for(tmp_path), said.append)
    assert "on every row" not in said[0]
    monkeypatch.setattr(measure, "reference_values", always_red)
    family = run(config_for(tmp_path, out=tmp_path / "red"), said.append)
    assert "the model answers 'red' on every row of test" in said[1]
    assert family.verify() == []


def test_data_of_one_class_only_make_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE, CHEAP])
    data = write_data(tmp_path / "data.jsonl")
    data.write_text(data.read_text().replace('"green"', '"red"'))
    family = run(config_for(tmp_path))
    assert family.verify() == []
    assert family.variant("cheap").measured is not None


def test_duplicates_and_empty_texts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE])
    train, test = write_data(tmp_path / "train.jsonl", 60), write_data(tmp_path / "test.jsonl", 40)
    with train.open("a") as file:
        file.write('{"text": "  "}\n{"text": ""}\n{"label": "red"}\n')
    said: list[str] = []
    family = run(config_for(tmp_path, files=DataFiles(train=train, test=test)), said.append)
    assert "train.jsonl: dropped 3 rows without text" in said[0]
    assert "dropped 40 duplicate texts: 40 from train" in said[0]
    assert (family.manifest.data["train"].rows, family.manifest.data["test"].rows) == (20, 40)


@pytest.mark.parametrize("name", ["train", "validation", "calibration", "test"])
def test_a_broken_line_in_any_split_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    install(monkeypatch, [REFERENCE])
    names = ("train", "validation", "calibration", "test")
    files = {split: write_data(tmp_path / f"{split}.jsonl", 30, start=100 * n) for n, split in enumerate(names)}
    lines = files[name].read_text().splitlines()
    files[name].write_text("\n".join([*lines[:6], "{broken", *lines[7:]]) + "\n")
    with pytest.raises(DataError, match=rf"{name}\.jsonl: 1 broken line: line 7: not JSON"):
        run(config_for(tmp_path, files=DataFiles(**files)))
    assert [path.name for path in (tmp_path / "family").iterdir()] == [".lock"]


def test_data_without_labels_have_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE])
    data = write_data(tmp_path / "data.jsonl")
    data.write_text(data.read_text().replace('"label"', '"unused"'))
    family = run(config_for(tmp_path, files=DataFiles(data=data)))
    found = family.variant("torch-fp32").measured
    assert found is not None
    assert found.quality.metric is None
    assert not family.manifest.data["test"].labelled


# Recipes


def test_what_cannot_be_built_here_has_a_reason() -> None:
    missing = {item.id: item.reason for item in recipes.unavailable()}
    assert set(missing) == {*recipes.CUDA_RECIPES, "sparse-unstructured", "sparse-2of4"}
    assert all("CUDA" in missing[name] for name in recipes.CUDA_RECIPES)
    assert "no kernel" in missing["sparse-unstructured"]


# Progress


def progress(width: int = 100, **settings: Any) -> tuple[Progress, Console]:
    console = Console(record=True, width=width, **settings)
    return Progress(console), console


def test_without_a_terminal_each_step_is_a_line_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = progress(force_terminal=False)
    with shown:
        shown.plan({"one": 10, "two": 20, "three": 40})
        with shown.step("one") as report:
            report(0.5)
        shown.skip("two", "already there")
        shown.fail("three", "no [brackets] lost")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "one" in lines[0]
    assert "left" in lines[0]
    assert "already there" in lines[1]
    assert "three: no [brackets] lost" in lines[2]


def test_the_estimate_follows_the_pace_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, *[20.0] * 50])
    monkeypatch.setattr("optimize.progress.time.monotonic", lambda: next(clock))
    shown, _ = progress(quiet=True)
    shown.plan({"one": 10, "two": 30})
    assert shown.seconds_left() == 40
    with shown.step("one"):
        pass
    # Twenty seconds where ten were foreseen, against ten on which the guesses were right.
    assert shown.seconds_left() == pytest.approx(45)
    assert shown.seconds_left("two", 0.5) == pytest.approx(22.5)


def test_a_step_that_fails_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = progress(force_terminal=False)

    def broken() -> None:
        with shown.step("one"):
            raise PassError("no")

    with shown, pytest.raises(PassError):
        broken()
    assert "one" not in capsys.readouterr().out


def test_measuring_is_not_repeated_for_a_failed_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [REFERENCE, CHEAP])
    config = config_for(tmp_path)
    tried: list[str] = []
    real = measure.measure

    def failing_once(directory: Path, *rest: Any) -> Any:
        tried.append(directory.name)
        if directory.name == "cheap" and tried.count("cheap") == 1:
            raise PassError("once")
        return real(directory, *rest)

    monkeypatch.setattr(measure, "measure", failing_once)
    assert list(run(config).variants) == ["torch-fp32"]
    assert list(Family.open(config.out).variants) == ["torch-fp32"]
    assert list(run(config).variants) == ["torch-fp32", "cheap"]
    assert tried == ["torch-fp32", "cheap", "cheap"]
