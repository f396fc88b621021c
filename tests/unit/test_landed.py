"""A row of a batch is judged, and shown, as it would be alone: the same float32 numbers, to the bit."""

from __future__ import annotations

import random

import numpy as np
import pytest

from deployments.landed import Landed
from fettle.answers import Floats, probabilities
from fettle.manifest import Gate, Head, Step, Task, TaskKind
from fettle.points import judge
from fettle.rows import Outputs
from tests.fakes import classify_task, embed_task

HEADS = [Head.SINGLE_LABEL, Head.MULTI_LABEL, Head.REGRESSION]
SIZES = [1, 2, 3, 7, 8, 9, 31, 64, 129, 300]
WIDTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 28, 33, 64, 129, 300]
ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 88.8, -104.0, 1e30, -1e30, 1e-40]


def task_of(head: Head, width: int) -> Task:
    return classify_task([f"label{n}" for n in range(width)]).model_copy(update={"head": head, "width": width})


def values_of(chance: random.Random, rows: int, width: int) -> Floats:
    rng = np.random.default_rng(chance.getrandbits(32))
    values = (rng.standard_normal((rows, width)) * 10 ** rng.uniform(-3, 2)).astype(np.float32)
    for _ in range(rows // 8):
        values[chance.randrange(rows), chance.randrange(width)] = chance.choice(ODD)
    return values


def step_of(chance: random.Random, stages: int) -> Step:
    gates = [
        Gate(threshold=chance.choice([0.0, 0.1, 0.5, 0.9, 1.0, 2.0]), temperature=chance.choice([1.0, 0.37, 2.5]))
        for _ in range(stages)
    ]
    return Step(variant="v", gates=gates)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_row_has_the_numbers_that_it_has_alone(head, width):
    chance = random.Random(width)
    task = task_of(head, width)
    for rows in SIZES:
        stages = chance.randint(1, 4)
        outputs = Outputs(
            values_of(chance, rows, width),
            1.0,
            np.array([chance.randrange(stages) for _ in range(rows)], np.int8) if stages > 1 else None,
        )
        landed = Landed(outputs)
        steps = [step_of(chance, stages) for _ in range(2)]
        for index in range(rows):
            answered = landed.answer(index, 0.0)
            alone = outputs.values[index][None].copy()
            assert answered.values.tobytes() == alone.tobytes()
            at = np.array([answered.stage], np.int8)
            for step in steps:
                for last in (False, True):
                    taken, scores = judge(alone, at, step, task, last=last)
                    got, score = landed.judged(index, step, task, last=last)
                    assert got is bool(taken[0])
                    assert np.float32(score).tobytes() == scores.tobytes()
            shown, best = landed.shown(index, task)
            expected = probabilities(alone, task)[0]
            assert shown.tobytes() == expected.tobytes()
            assert best == expected.argmax()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_order_of_an_engines_array_changes_nothing():
    values = values_of(random.Random(1), 64, 28)
    plain, turned = Landed(Outputs(values, 1.0)), Landed(Outputs(np.asfortranarray(values), 1.0))
    task = task_of(Head.SINGLE_LABEL, 28)
    for index in range(64):
        assert plain.shown(index, task)[0].tobytes() == turned.shown(index, task)[0].tobytes()
        assert turned.answer(index, 0.0).values.flags.c_contiguous


def test_vectors_have_no_score_and_are_all_taken_at_the_end():
    landed = Landed(Outputs(values_of(random.Random(2), 8, 4), 1.0))
    step = Step(variant="v", gates=[Gate(threshold=0.0)])
    assert embed_task(4).kind is TaskKind.EMBED
    taken, score = landed.judged(0, step, embed_task(4), last=True)
    assert taken
    assert np.isnan(score)
    assert not landed.judged(0, step, embed_task(4), last=False)[0]
