"""Students of one tiny real model: what is trained, what is kept, and what a run that was killed redoes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fettle.config import DataFiles, OptimizeConfig
from fettle.errors import PassError
from fettle.manifest import Analysis, PassRecord
from fettle.store import TEMPORARY
from optimize import measure, train
from optimize.data import load_splits
from optimize.load import Reference, load_reference
from optimize.pipeline import write_tokenizer
from optimize.progress import Progress
from optimize.recipes import Plan, Round
from optimize.student import WEIGHTS, parameters
from optimize.train import Student, make_student, step_seconds
from optimize.workspace import Work
from tests.unit import tiny_models

FROZEN = Plan("exits-frozen", exits=(1,), frozen=True)
PRUNED = Plan("pruned", (Round("prune", {"keep_share": 0.75}, 0.5), Round("prune", {"keep_share": 0.7}, 0.5)))
SHARED = Plan("shared", (Round("share", epochs=0.5),))
ALONG = Plan("exits-distilled", (Round("none", epochs=0.5),), exits=(1,))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(str(tiny_models.classifier(tmp_path_factory.mktemp("bert"))))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dice = random.Random(0)
    texts = [" ".join(dice.choices(tiny_models.WORDS, k=dice.randint(2, 9))) for _ in range(160)]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Bench:
    """Works on one directory, each as a run of its own, and what they said."""

    def __init__(self, out: Path, reference: Reference, data: Path) -> None:
        self.out, self.reference, self.data = out, reference, data

    def work(self, **changes: Any) -> Work:
        console = Console(record=True, width=200, file=io.StringIO())
        config = OptimizeConfig(model="m", out=self.out, files=DataFiles(data=self.data), **changes)
        self.out.mkdir(exist_ok=True)
        write_tokenizer(config, self.reference)
        self.said: Callable[[], str] = console.export_text
        return Work(config, Progress(console), self.reference, load_splits(config.files, config.seed))


@pytest.fixture
def bench(tmp_path: Path, reference: Reference, data: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    # A model this small gains nothing from a second core, and loses much where others are at work on it.
    monkeypatch.setattr(train, "usable_cores", lambda: 1)
    return Bench(tmp_path / "family", reference, data)


def weights(module: nn.Module | None) -> dict[str, torch.Tensor]:
    assert module is not None
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def same_student(left: Student, right: Student) -> bool:
    heads = [student.multi_exit for student in (left, right)]
    assert (heads[0] is None) == (heads[1] is None)
    return (
        left.fingerprint == right.fingerprint
        and left.operations == right.operations
        and left.passes == right.passes
        and same(weights(left.scorer), weights(right.scorer))
        and (heads[0] is None or same(weights(heads[0]), weights(heads[1])))
    )


@pytest.mark.parametrize("plan", [FROZEN, PRUNED, SHARED, ALONG], ids=lambda plan: plan.id)
def test_a_second_call_loads_the_same_student_bit_by_bit(
    bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = weights(bench.reference.model)
    first = make_student(bench.work(), plan)
    assert same(untouched, weights(bench.reference.model)), "the reference was changed"

    def never(*_: object) -> None:
        raise AssertionError("something was trained again")

    monkeypatch.setattr(train, "distill", never)
    monkeypatch.setattr(train, "train_frozen_heads", never)
    work = bench.work()
    again = make_student(work, plan)
    assert same_student(first, again)
    assert bench.said().count("already there") == len(step_seconds(plan, 100))


def test_frozen_exits_leave_the_backbone_as_it_is(bench: Bench) -> None:
    work = bench.work()
    student = make_student(work, FROZEN)
    assert same(weights(student.scorer), weights(bench.reference.model))
    assert student.heads is not None
    assert list(student.heads.by_layer) == [1]
    (record,) = student.passes
    assert record.name == "exit-heads"
    assert record.parameters["layers"] == [1]
    assert 0 <= student.heads.disagreement[1] <= 1
    rows = work.rows("test")
    last = measure.torch_values(lambda *inputs: student.multi_exit(*inputs)[-1], bench.reference, rows, lambda _: None)
    assert torch.allclose(torch.from_numpy(last), torch.from_numpy(work.answers("test")), atol=1e-5)


def test_two_rounds_of_pruning_make_the_model_smaller_twice(bench: Bench) -> None:
    student = make_student(bench.work(), PRUNED)
    assert [record.name for record in student.passes] == ["prune-heads-and-neurons", "distill"] * 2
    sizes = [record.notes["parameters"] for record in student.passes[::2]]
    assert parameters(bench.reference.model) > sizes[0] > sizes[1] == parameters(student.scorer)  # type: ignore[operator]
    assert not any(weight.requires_grad for weight in student.scorer.parameters())


def test_shared_layers_are_shared_after_loading_too(bench: Bench) -> None:
    made = make_student(bench.work(), SHARED)
    loaded = make_student(bench.work(), SHARED)
    for student in (made, loaded):
        one, two = student.scorer.model.bert.encoder.layer
        assert one.attention.self.query.weight is two.attention.self.query.weight
        assert parameters(student.scorer) == parameters(made.scorer) < parameters(bench.reference.model)


def test_exits_that_are_trained_along_come_with_their_student(bench: Bench) -> None:
    student = make_student(bench.work(), ALONG)
    assert [record.name for record in student.passes] == ["exit-heads", "distill"]
    assert student.heads is not None
    steps = student.passes[1].notes["steps"]
    assert isinstance(steps, int)
    assert steps > 0


def test_plans_with_the_same_heads_on_the_same_backbone_train_them_once(bench: Bench) -> None:
    make_student(bench.work(), FROZEN)
    make_student(bench.work(), ALONG)
    assert "train exit heads of exits-distilled (already there" in bench.said()


def test_plans_that_begin_alike_train_what_they_share_once(bench: Bench) -> None:
    begun = Plan("begun", PRUNED.rounds[:1])
    make_student(bench.work(), begun)
    make_student(bench.work(), PRUNED)
    assert f"train {PRUNED.id}, round 1 of 2 (already there" in bench.said()


def test_killed_in_the_second_round_only_that_is_trained_again(
    bench: Bench, tmp_path: Path, reference: Reference, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_student(Bench(tmp_path / "other", reference, data).work(), PRUNED)
    real, calls = train.distill, []

    def killed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(train, "distill", killed)
    with pytest.raises(KeyboardInterrupt):
        make_student(bench.work(), PRUNED)
    assert len(list((bench.out / ".work" / "students").iterdir())) == 1
    assert not list(bench.out.rglob(f"{TEMPORARY}*"))
    student = make_student(bench.work(), PRUNED)
    assert len(calls) == 3
    assert "round 1 of 2 (already there" in bench.said()
    # The seed decides everything, so nothing shows that there was a break.
    assert student.fingerprint == whole.fingerprint
    assert same(weights(student.scorer), weights(whole.scorer))


def test_a_failing_round_leaves_nothing_half_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PassError, match="no change of shape is called 'fold'"):
        make_student(bench.work(), Plan("folded", (Round("fold"),)))
    assert not list((bench.out / ".work").glob("students/*"))
    assert not list(bench.out.rglob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_a_damaged_student_is_trained_again(bench: Bench, damage: bytes) -> None:
    first = make_student(bench.work(), SHARED)
    (folder,) = (bench.out / ".work" / "students").iterdir()
    file = folder / WEIGHTS
    file.write_bytes(damage)
    again = make_student(bench.work(), SHARED)
    assert f"what was kept of students/{folder.name} is made again" in bench.said()
    assert same(weights(first.scorer), weights(again.scorer))
    assert file.stat().st_size > len(damage)


def test_damaged_heads_are_trained_again(bench: Bench) -> None:
    first = make_student(bench.work(), FROZEN)
    (folder,) = (bench.out / ".work" / "students").iterdir()
    (folder / "exits.safetensors").write_bytes(b"damaged")
    again = make_student(bench.work(), FROZEN)
    assert same(weights(first.multi_exit), weights(again.multi_exit))
    assert "is made again" in bench.said()


def test_what_a_student_depends_on_is_in_its_fingerprint(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_distilled", lambda student, *_: PassRecord(name="distill", seconds=0))
    found = {make_student(bench.work(), SHARED).fingerprint}
    found.add(make_student(bench.work(seed=1), SHARED).fingerprint)
    found.add(make_student(bench.work(), Plan("shared", (Round("share", epochs=0.6),))).fingerprint)
    found.add(make_student(bench.work(), Plan("shared", (Round("none", epochs=0.5),))).fingerprint)
    found.add(make_student(bench.work(effort="standard"), SHARED).fingerprint)
    lines = bench.data.read_text().splitlines()
    bench.data = tmp_path / "fewer.jsonl"
    bench.data.write_text("\n".join(lines[:140]) + "\n")
    found.add(make_student(bench.work(), SHARED).fingerprint)
    # All rows are used at either effort, so that makes no difference.
    assert len(found) == 5


@pytest.mark.parametrize("plan", [FROZEN, PRUNED, SHARED, ALONG], ids=lambda plan: plan.id)
def test_the_steps_that_were_announced_are_those_that_come(
    bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = bench.work()
    make_student(work, plan)
    said = bench.said()
    for step in step_seconds(plan, 100):
        assert f"✓ {step} (" in said


def test_the_analysis_is_scaled_and_kept(bench: Bench) -> None:
    found = train.analyse(bench.work())
    assert len(found.layer_influence) == 2
    assert all(0 <= influence <= 2 for influence in found.layer_influence)
    assert [len(layer) for layer in found.head_importance] == [4, 4]
    assert [len(layer) for layer in found.neuron_importance] == [10, 10]
    for rows in (found.head_importance, found.neuron_importance):
        assert max(value for row in rows for value in row) == 1.0
        assert min(value for row in rows for value in row) >= 0.0
    for row in found.neuron_importance:
        assert row == sorted(row, reverse=True)
    assert train.analyse(bench.work()) == found == Analysis.model_validate(found.model_dump())
    assert f"{train.ANALYSIS} (already there" in bench.said()
