"""How each stage of a variant fares on some rows: its scores, where it is wrong, and what a list of gates makes of it.

The same grading serves the tuning rows, on which the search runs, and the calibration rows, on which nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from fettle.answers import EMBEDDING_COSINE_FLOOR, Floats, disagreements
from fettle.manifest import Bin, Gate, Head, Step, Task
from fettle.points import NEVER, has_scores, scores_at
from fettle.policy import passes

Bools = NDArray[np.bool_]

COOLEST, HOTTEST = 0.05, 20.0
# Thresholds tried at each gate: far fewer than rows, which are not to be fitted by heart, and dense at both ends, since
# a good variant escalates a few rows in a hundred and an early exit takes only the surest.
GRID = 200
ROWS_PER_LEVEL = 10
BINS = 10


@dataclass(frozen=True, slots=True)
class Truth:
    """What the reference answers on some rows, float32 [rows, width], and what counts as another answer."""

    values: Floats
    task: Task
    cosine_floor: float = EMBEDDING_COSINE_FLOOR

    def differs(self, values: Floats) -> Bools:
        with np.errstate(invalid="ignore"):
            return disagreements(values, self.values, self.task, self.cosine_floor)


@dataclass(frozen=True)
class Graded:
    """What one stage of a variant did on some rows, in each batching tried.

    `scores` float32 [batchings, rows], NaN where there is none; `wrong` bool [batchings, rows]: another answer than the
    reference's; `cost_ms` is what this stage adds for a row that reaches it.
    """

    variant: str
    stage: int
    temperature: float
    cost_ms: float
    scores: Floats
    wrong: Bools

    def taken(self, threshold: float) -> Bools:
        return passes(self.scores, threshold)

    @cached_property
    def lowest(self) -> Floats:
        """The worst score over the batchings [rows]; what has none is below every threshold."""
        filled: Floats = np.nan_to_num(self.scores, nan=-1.0).min(axis=0)
        return filled

    @cached_property
    def ever_wrong(self) -> Bools:
        return np.asarray(self.wrong.any(axis=0))

    @cached_property
    def order(self) -> NDArray[np.intp]:
        return np.argsort(-self.lowest, kind="stable")

    @cached_property
    def grid(self) -> Floats:
        """Thresholds to try, falling, `NEVER` first: float32."""
        finite = self.lowest[self.lowest >= 0]
        if not len(finite):
            return np.array([NEVER], np.float32)
        shares = np.sin(np.linspace(0, np.pi / 2, min(GRID, max(2, len(finite) // ROWS_PER_LEVEL)))) ** 2
        levels = np.unique(np.quantile(finite, shares, method="higher"))[::-1]
        return np.concatenate([[np.float32(NEVER)], levels]).astype(np.float32)

    @cached_property
    def cuts(self) -> NDArray[np.intp]:
        """For each threshold of `grid`, how many rows reach it, ties included."""
        return np.searchsorted(-self.lowest[self.order], -self.grid, side="right")


def fit_temperature(values: Floats, reference: Floats, task: Task) -> float:
    """The temperature at which a stage's logits [rows, width] best predict the reference's answers; 1 without scores.

    Least negative log likelihood of the reference's first label, or of its labels (Guo et al., "On calibration of
    modern neural networks", 2017, with the reference's answer in place of the truth).
    """
    fine = np.isfinite(values).all(axis=1)
    if not has_scores(task) or not fine.any():
        return 1.0
    logits, truth = values[fine].astype(np.float64), reference[fine]
    loss = _single_label_loss if task.head is Head.SINGLE_LABEL else _multi_label_loss
    found = minimize_scalar(
        lambda log: loss(logits / np.exp(log), truth),
        bounds=(np.log(COOLEST), np.log(HOTTEST)),
        method="bounded",
        options={"xatol": 0.01},
    )
    return float(np.float32(np.exp(found.x)))


def grade(
    variant: str,
    costs_ms: Sequence[float],
    traces: Sequence[Floats],
    truth: Truth,
    temperatures: Sequence[float] | None = None,
) -> list[Graded]:
    """Each stage of a variant, from its outputs [rows, stages, width] in each batching; fits temperatures if None."""
    graded = []
    for stage, cost in enumerate(costs_ms):
        tried = [trace[:, stage] for trace in traces]
        if temperatures is None:
            temperature = fit_temperature(
                np.concatenate(tried), np.concatenate([truth.values] * len(tried)), truth.task
            )
        else:
            temperature = temperatures[stage]
        gate = Gate(threshold=0.0, temperature=temperature)
        scores = np.stack([scores_at(values, truth.task, gate) for values in tried])
        wrong = np.stack([truth.differs(values) for values in tried])
        graded.append(Graded(variant, stage, temperature, cost, scores, wrong))
    return graded


def worst_errors(steps: Sequence[Step], graded: Mapping[str, Sequence[Graded]]) -> Bools:
    """Rows that are answered wrongly in at least one batching, bool [rows].

    Each gate may meet the row in any of the batchings, whatever it met before: companions change from step to step, and
    from stage to stage where the batch is compacted. With one batching it is what `fettle.points.replay` gives.
    """
    gates = gates_of(steps, graded)
    errors = np.asarray(gates[-1][0].wrong.any(axis=0))
    for stage, threshold in reversed(gates[:-1]):
        taken = stage.taken(threshold)
        errors = (taken & stage.wrong).any(axis=0) | ((~taken).any(axis=0) & errors)
    return errors


def expected_cost(steps: Sequence[Step], graded: Mapping[str, Sequence[Graded]]) -> float:
    """Milliseconds of a row on average: the sum over stages of cost x P(reach), a mean over the batchings."""
    reach: Any = 1.0
    cost = 0.0
    for stage, threshold in gates_of(steps, graded):
        cost += stage.cost_ms * float(np.mean(reach))
        reach = reach * (~stage.taken(threshold)).mean(axis=0)
    return cost


def bins(graded: Graded) -> list[Bin]:
    """Tenths of the score, with the share of each that agrees with the reference, in the first batching."""
    scores, agreed = graded.scores[0], ~graded.wrong[0]
    tenth = np.minimum(np.floor(np.nan_to_num(scores, nan=-1.0) * BINS), BINS - 1)
    filled = []
    for number in range(BINS):
        here = tenth == number
        rows = int(here.sum())
        filled.append(
            Bin(
                low=number / BINS,
                high=(number + 1) / BINS,
                rows=rows,
                mean_score=float(scores[here].mean()) if rows else (number + 0.5) / BINS,
                agreed=float(agreed[here].mean()) if rows else 0.0,
            )
        )
    return filled


def gates_of(steps: Sequence[Step], graded: Mapping[str, Sequence[Graded]]) -> list[tuple[Graded, float]]:
    return [
        (stage, gate.threshold) for step in steps for stage, gate in zip(graded[step.variant], step.gates, strict=True)
    ]


def _single_label_loss(logits: NDArray[np.float64], reference: Floats) -> float:
    chosen = logits[np.arange(len(logits)), reference.argmax(axis=1)]
    return float((logsumexp(logits, axis=1) - chosen).mean())


def _multi_label_loss(logits: NDArray[np.float64], reference: Floats) -> float:
    return float(np.logaddexp(0.0, np.where(reference > 0, -logits, logits)).mean())
