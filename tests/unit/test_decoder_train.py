"""Students of a language model by plan: made, kept, gone on with, and ready to be exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fettle.errors import PassError
from fettle.manifest import DecoderSpec
from fettle.rows import Row
from optimize import decoder_train
from optimize.cache import Cache
from optimize.decoder_data import Prompts
from optimize.decoder_load import DecoderReference
from optimize.decoder_samples import generated
from optimize.decoder_train import SHRINK, School, TextStudent, make_text_student, school_of
from optimize.load import load_reference
from optimize.progress import Progress
from optimize.recipes import Plan, Round
from optimize.workspace import fingerprint_of
from tests.unit import tiny_decoders

SMALL = {"layers": 2, "neurons": 0.5, "groups": 2, "pooled": 1}
PLAN = Plan("small", (Round(SHRINK, SMALL, epochs=2, learning_rate=3e-3), Round("none", epochs=1, learning_rate=1e-3)))


def prompts(count: int, seed: int) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 60, random.integers(2, 12)).astype(np.int32) for _ in range(count)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> DecoderReference:
    source = tiny_decoders.save_decoder(tmp_path_factory.mktemp("lm"), "qwen3", num_key_value_heads=4)
    found = load_reference(str(source))
    assert isinstance(found, DecoderReference)
    return found


@pytest.fixture
def school(tmp_path: Path, reference: DecoderReference, monkeypatch: pytest.MonkeyPatch) -> School:
    for name, value in (("TAUGHT_ROWS", 24), ("SAMPLED_ROWS", 10), ("TUNING_ROWS", 16), ("BLOCK_ROWS", 9)):
        monkeypatch.setattr(decoder_train, name, value)
    rights = [row if number % 2 else None for number, row in enumerate(prompts(40, 2))]
    return School(
        reference=reference,
        cache=Cache(tmp_path),
        progress=Progress(),
        prompts=prompts(40, 0),
        right=rights,
        tuning=prompts(20, 1),
        max_tokens=4,
        seed=0,
        fingerprint="0" * 64,
    )


def weights(student: TextStudent) -> list[torch.Tensor]:
    return list(student.model.state_dict().values())


def test_a_plan_is_carried_out_round_by_round_and_kept(school: School, monkeypatch: pytest.MonkeyPatch):
    student = make_text_student(school, PLAN)
    assert [record.name for record in student.passes] == ["prune", "distill", "distill"]
    shape = student.passes[0]
    assert shape.parameters == SMALL
    assert len(shape.notes["kept"]) == 2
    assert (shape.notes["neurons"], shape.notes["heads"], shape.notes["kv_heads"]) == (32, 2, 1)
    assert shape.notes["parameters"] == student.model.num_parameters()
    assert student.passes[1].notes["examples"] == 24 + 10 + 8
    assert not any(weight.requires_grad for weight in student.model.parameters())
    assert student.scorer(torch.tensor([[1, 2]]), torch.ones(1, 2)).shape == (1, tiny_decoders.VOCABULARY)
    assert not list(school.cache.directory.rglob("*-notes"))

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(decoder_train, "distill_decoder", never)
    monkeypatch.setattr(decoder_train, "generated", never)
    again = make_text_student(school, PLAN)
    assert again.fingerprint == student.fingerprint
    assert again.passes == student.passes
    assert all(torch.equal(left, right) for left, right in zip(weights(again), weights(student), strict=True))


def test_a_plan_that_begins_alike_shares_the_first_round(school: School, monkeypatch: pytest.MonkeyPatch):
    make_text_student(school, Plan("one", PLAN.rounds[:1]))
    trained: list[object] = []
    train = decoder_train.distill_decoder

    def counted(*args: Any) -> Any:
        trained.append(args)
        return train(*args)

    monkeypatch.setattr(decoder_train, "distill_decoder", counted)
    make_text_student(school, PLAN)
    assert len(trained) == 1


def test_damaged_rounds_and_answers_are_made_again(school: School):
    plan = Plan("one", PLAN.rounds[:1])
    student = make_text_student(school, plan)
    [kept] = school.cache.directory.rglob("model.safetensors")
    kept.write_bytes(b"x" * 40)
    for path in school.cache.directory.rglob("*.npz"):
        path.write_bytes(b"x")
    again = make_text_student(school, plan)
    assert all(torch.equal(left, right) for left, right in zip(weights(again), weights(student), strict=True))


def test_a_killed_round_goes_on_from_its_notes(school: School, monkeypatch: pytest.MonkeyPatch):
    seen: list[Path] = []
    train = decoder_train.distill_decoder

    def killed(*args: Any) -> Any:
        seen.append(args[-1])
        args[-1].mkdir(parents=True)
        (args[-1] / "mark").touch()
        raise KeyboardInterrupt

    plan = Plan("one", PLAN.rounds[:1])
    monkeypatch.setattr(decoder_train, "distill_decoder", killed)
    with pytest.raises(KeyboardInterrupt):
        make_text_student(school, plan)

    def gone_on(*args: Any) -> Any:
        seen.append(args[-1])
        assert (args[-1] / "mark").exists()
        return train(*args)

    monkeypatch.setattr(decoder_train, "distill_decoder", gone_on)
    make_text_student(school, plan)
    assert seen[0] == seen[1]
    assert not seen[0].exists()


def test_greedy_answers_may_come_from_elsewhere(school: School, reference: DecoderReference):
    asked: list[tuple[str, int]] = []

    def greedy(split: str, rows: Any) -> list[Any]:
        asked.append((split, len(rows)))
        return generated(
            reference.language,
            rows,
            end_ids=reference.task.end_ids,
            pad_id=reference.tokenizer.pad_id,
            max_tokens=4,
        )

    plan = Plan("one", PLAN.rounds[:1])
    mine = make_text_student(replace(school, greedy=greedy), plan)
    assert sorted(asked) == [("train", 24), ("validation", 16)]
    kept = Cache(school.cache.directory.parent / "other")
    theirs = make_text_student(replace(school, cache=kept), plan)
    assert all(torch.equal(left, right) for left, right in zip(weights(mine), weights(theirs), strict=True))


def test_a_run_becomes_a_school(school: School, reference: DecoderReference):
    splits = {"train": prompts(3, 0), "validation": prompts(2, 1)}
    work: Any = SimpleNamespace(
        reference=reference,
        cache=school.cache,
        progress=school.progress,
        config=SimpleNamespace(seed=5),
        max_tokens=7,
        prompts=Prompts(reference.tokenizer_json, special=False, context=64),
        rows=lambda split: [Row(ids) for ids in splits[split]],
        right_answers=lambda split: ["the", None, ""],
        fingerprint_of=fingerprint_of,
        fingerprint_of_rows=lambda names: {"splits": names},
    )
    found = school_of(work)
    assert [row.tolist() for row in found.prompts] == [row.tolist() for row in splits["train"]]
    assert [row.tolist() for row in found.tuning] == [row.tolist() for row in splits["validation"]]
    assert [None if right is None else work.prompts.decode(right) for right in found.right] == ["the", None, None]
    assert (found.seed, found.max_tokens, found.greedy) == (5, 7, None)
    work.prompts.special = True
    assert school_of(work).fingerprint != found.fingerprint
    work.right_answers = lambda split: None
    assert school_of(work).right == [None] * 3


def test_a_student_stands_in_for_the_reference(school: School, reference: DecoderReference):
    student = make_text_student(school, Plan("one", PLAN.rounds[:1]))
    stand_in = reference.with_student(student.scorer)
    assert stand_in.language is student.model
    assert stand_in.decoder == DecoderSpec(layers=2, kv_heads=1, head_dim=16, context=reference.decoder.context)
    assert stand_in.layers == 2
    assert reference.decoder.layers == 3
    assert stand_in.tokenizer_json == reference.tokenizer_json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Round("width", {"share": 0.5}), "no change of a language model"),
        (Round(SHRINK, {"width": 3}), "no change of a language model"),
        (Round(SHRINK, {"layers": 0}), "cannot be dropped"),
        (Round(SHRINK, {"groups": 9}), "9 cannot be kept"),
        (Round(SHRINK, {"pooled": 3}), "cannot be merged"),
    ],
)
def test_changes_that_do_not_fit_are_refused(school: School, change: Round, message: str):
    with pytest.raises(PassError, match=message):
        make_text_student(school, Plan("wrong", (change,)))
