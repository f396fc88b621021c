"""A request's walk along a way: each step's batcher in turn, with the rows that the steps before did not take.

Who takes a row is `fettle.points.judge`, the rule that `predict` follows and certificates are about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deployments.batcher import Batcher
from deployments.landed import Answered
from deployments.served import ServedFamily
from deployments.tickets import Leg, Terms
from fettle.manifest import Step
from fettle.menu import Way
from fettle.rows import Row
from fettle.scheduling import NEVER


@dataclass(frozen=True, slots=True)
class Visit:
    """A row at one step of its way."""

    step: Step
    answered: Answered
    score: float
    taken: bool


@dataclass(slots=True)
class Walked:
    """`values` float32 [rows, width]; `visits` [rows]: the steps that each row took; the longest times in ms."""

    values: NDArray[np.float32]
    visits: list[list[Visit]]
    queue_ms: float = 0.0
    infer_ms: float = 0.0

    @property
    def answered(self) -> list[Answered]:
        """What answered each row."""
        return [visits[-1].answered for visits in self.visits]

    @property
    def places(self) -> list[tuple[str, int]]:
        """The variant and stage that answered each row."""
        return [(visits[-1].step.variant, visits[-1].answered.stage) for visits in self.visits]

    @property
    def variants(self) -> list[str]:
        """Those that answered a row, each once."""
        return list(dict.fromkeys([visits[-1].step.variant for visits in self.visits]))

    @property
    def stages(self) -> list[int]:
        """The stages that answered a row, each once."""
        return list(dict.fromkeys([visits[-1].answered.stage for visits in self.visits]))


async def walk(family: ServedFamily, way: Way, rows: Sequence[Row], terms: Terms) -> Walked:
    """Answer the rows.

    Raises:
        DeadlineError, EngineError, UnavailableError: see `Batcher.answer`.
    """
    walked = Walked(np.empty((len(rows), family.task.width), np.float32), [[] for _ in rows])
    left = list(range(len(rows)))
    for number, stretch in enumerate(way.stretches):
        leg = Leg(stretch.gates, stretch.share, _reserve_s(family, way, number, terms), admitted=number > 0)
        batcher = family.batchers[stretch.step.variant]
        assert isinstance(batcher, Batcher)
        answers = await _answers(batcher, [rows[index] for index in left], terms, leg, stretch.step.variant)
        walked.queue_ms += max(answer.queue_ms for answer in answers)
        walked.infer_ms += max(answer.infer_ms for answer in answers)
        came = len(left)
        left = _take(family, walked, stretch.step, left, answers, last=number == len(way.stretches) - 1)
        family.demand.passed(way, number, came, len(left))
        if not left:
            break
    return walked


async def _answers(batcher: Batcher, rows: list[Row], terms: Terms, leg: Leg, variant: str) -> list[Answered]:
    if terms.trace is None:
        return await batcher.answer(rows, terms, leg)
    with terms.trace.step(variant) as traced:
        answers = await batcher.answer(rows, terms, replace(leg, trace=traced.parent))
        queue_ms = max(answer.queue_ms for answer in answers)
        traced.tell(queue_ms, {"rows": len(answers), "batch_rows": answers[0].batch_rows})
        return answers


def _take(
    family: ServedFamily, walked: Walked, step: Step, left: list[int], answers: Sequence[Answered], *, last: bool
) -> list[int]:
    """Note what the step said of each row; returns those that go on."""
    task, going = family.task, []
    for index, answer in zip(left, answers, strict=True):
        done, score = answer.landed.judged(answer.index, step, task, last=last)
        walked.visits[index].append(Visit(step, answer, score, done))
        if done:
            walked.values[index] = answer.values
        else:
            going.append(index)
    return going


def _reserve_s(family: ServedFamily, way: Way, number: int, terms: Terms) -> float:
    """What the steps after this one are expected to take of the time, by how often rows get there."""
    here = way.stretches[number].reach
    if terms.deadline == NEVER or here <= 0:
        return 0.0
    return math.fsum(
        stretch.reach / here * (batcher.backlog_s + batcher.call_s)
        for stretch in way.stretches[number + 1 :]
        for batcher in [family.batchers[stretch.step.variant]]
    )
