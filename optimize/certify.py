"""Which operating points may be promised: found on `validation`, tested on `calibration`, level by level.

For each level a path of policies from conservative to aggressive is fixed on the tuning rows; the exact test walks
along it on rows that nothing was tuned on, and the first failure ends it (`fettle.certificates`). Each level holds at
confidence 1 - delta on its own; all m together at 1 - m delta, or at 1 - delta with `simultaneous`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fettle import certificates
from fettle.answers import EMBEDDING_COSINE_FLOOR, Floats
from fettle.errors import PassError
from fettle.manifest import (
    Head,
    LabelDisagreement,
    Level,
    OperatingPoint,
    ScoreCalibration,
    Step,
    Task,
    Tested,
)
from fettle.points import has_scores
from optimize.grading import Graded, Truth, bins, grade, worst_errors
from optimize.thresholds import Policy, cheapest, search

LEVELS: Final = (0.005, 0.01, 0.02, 0.05)
DELTA: Final = 0.05
# Budgets of tuned disagreement along a path, as shares of the level. Beyond 1 nothing is likely to pass.
BUDGETS: Final = (0.0, 0.05, 0.1, 0.15, *np.linspace(0.2, 1.1, 19).tolist())
TEMPERATURES_SHARE = 0.1

Report = Callable[[float], None]
Stages = Mapping[str, Sequence[Graded]]
Words = Callable[[Sequence[Step]], str]
Batchings = Literal["any", "worst of alone, mixed and full"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A measured variant and its outputs on both splits, one array float32 [rows, stages, width] for each batching.

    One batching says that answers do not depend on it. `stage_cpu_ms`: what each stage adds to a row that reaches it.
    """

    id: str
    stage_cpu_ms: tuple[float, ...]
    validation: Sequence[Floats]
    calibration: Sequence[Floats]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be certified: candidates, and what the reference answers on both splits, float32 [rows, width].

    `reference` names the candidate that runs the reference itself (its values up to rounding): the last resort of every
    cascade. `self_changed` is the share of answers in which the reference disagrees with itself.
    """

    task: Task
    reference: str
    candidates: Sequence[Candidate]
    validation: Floats
    calibration: Floats
    self_changed: float = 0.0
    cosine_floor: float = EMBEDDING_COSINE_FLOOR


@dataclass(frozen=True, slots=True)
class Tuned:
    """What the tuning rows gave: policies to choose paths from, and every stage graded at its temperature."""

    policies: list[Policy]
    stages: dict[str, list[Graded]]


@dataclass(frozen=True, slots=True)
class Unseen:
    """The calibration rows, as a path of policies is tested on them: how many there are, and how many a policy changes.

    `batchings`: in which a policy's errors are counted.
    """

    rows: int
    errors: Callable[[Policy], int]
    self_changed: float = 0.0
    batchings: Callable[[Policy], Batchings] = lambda _: "any"


@dataclass(frozen=True, slots=True)
class Certified:
    """`points` in the order of the levels that have one; `notes` say in words what was decided."""

    points: list[OperatingPoint]
    levels: list[Level]
    scores: list[ScoreCalibration]
    notes: list[str]


def certify(
    problem: Problem,
    levels: Sequence[float] = LEVELS,
    delta: float = DELTA,
    *,
    simultaneous: bool = False,
    report: Report = lambda _: None,
) -> Certified:
    """Search and test. One thread, about a minute for eight variants and some thousand rows.

    Raises:
        PassError: the candidates' arrays do not fit together, or the reference is not among them.
    """
    _check(problem)
    each = delta / len(levels) if simultaneous else delta
    tuned = tune(problem, levels, report)
    unseen = _unseen(problem, calibration_stages(problem, tuned))
    points, done = [], []
    for alpha in levels:
        level, point = certify_level(path(tuned.policies, alpha), unseen, alpha, each)
        done.append(level)
        points += [point] if point else []
    scores = []
    if has_scores(problem.task):
        scores = [
            ScoreCalibration(variant=name, stage=stage.stage, temperature=stage.temperature, bins=bins(stage))
            for name, stages in tuned.stages.items()
            for stage in stages
        ]
    ways = f"{len(tuned.policies)} ways to answer from {len(tuned.stages)} variants"
    return Certified(points, done, scores, notes(ways, done, points, each))


def tune(problem: Problem, levels: Sequence[float] = LEVELS, report: Report = lambda _: None) -> Tuned:
    """Temperatures and policies, from the validation rows alone."""
    stages = {}
    for number, candidate in enumerate(problem.candidates):
        stages[candidate.id] = grade(
            candidate.id,
            candidate.stage_cpu_ms,
            candidate.validation,
            Truth(problem.validation, problem.task, problem.cosine_floor),
        )
        report(TEMPERATURES_SHARE * (number + 1) / len(problem.candidates))
    budgets = sorted({share * alpha for alpha in levels for share in BUDGETS})
    policies = search(
        stages,
        problem.reference,
        budgets,
        problem.task,
        lambda done: report(TEMPERATURES_SHARE + (1 - TEMPERATURES_SHARE) * done),
    )
    return Tuned(policies, stages)


def calibration_stages(problem: Problem, tuned: Tuned) -> dict[str, list[Graded]]:
    """The calibration rows, scored at the temperatures that the validation rows gave."""
    return {
        candidate.id: grade(
            candidate.id,
            candidate.stage_cpu_ms,
            candidate.calibration,
            Truth(problem.calibration, problem.task, problem.cosine_floor),
            [stage.temperature for stage in tuned.stages[candidate.id]],
        )
        for candidate in problem.candidates
    }


def path(policies: Sequence[Policy], alpha: float) -> list[Policy]:
    """From conservative to aggressive: the cheapest within each budget of tuned disagreement, ever cheaper."""
    chosen: list[Policy] = []
    for share in BUDGETS:
        policy = cheapest(policies, share * alpha)
        if policy and (not chosen or policy.cost_ms < chosen[-1].cost_ms):
            chosen.append(policy)
    return chosen


def in_words(steps: Sequence[Step]) -> str:
    """Variants with the thresholds of their gates, such as `exits (0.780, never, 0.412) > onnx-fp32`."""
    parts = []
    for number, step in enumerate(steps):
        gates = step.gates if number < len(steps) - 1 else step.gates[:-1]
        shown = ", ".join("never" if gate.threshold > 1 else f"{gate.threshold:.3f}" for gate in gates)
        parts.append(f"{step.variant} ({shown})" if shown else step.variant)
    return " > ".join(parts)


def label_disagreement(
    reference: Floats, changed: Mapping[str, NDArray[np.bool_]], task: Task
) -> list[LabelDisagreement]:
    """For each label that the reference gives to some of these rows: the share that each point or variant changes.

    Args:
        reference: its values on the rows, float32 [rows, width].
        changed: by point or variant, which rows it answers otherwise, bool [rows].
    """
    if task.head is Head.MULTI_LABEL:
        given = reference > 0
    elif has_scores(task):
        given = np.arange(task.width) == reference.argmax(axis=1)[:, None]
    else:
        return []
    return [
        LabelDisagreement(
            label=label,
            rows=int(given[:, number].sum()),
            changed={name: float(rows[given[:, number]].mean()) for name, rows in changed.items()},
        )
        for number, label in enumerate(task.labels)
        if given[:, number].any()
    ]


def certify_level(
    planned: Sequence[Policy], unseen: Unseen, alpha: float, delta: float, words: Words = in_words
) -> tuple[Level, OperatingPoint | None]:
    """Test a path of policies in its order on rows that it was not made with; the last that passes may be promised."""
    needed = certificates.rows_needed(alpha, delta)
    if unseen.self_changed > alpha:
        reason = f"the reference disagrees with itself on {unseen.self_changed:.2%} of the rows, in other batches"
        return Level(alpha=alpha, reason=reason), None
    if unseen.rows < needed:
        few = f"{unseen.rows} calibration rows are too few"
        reason = f"{few}: it takes {needed} at the least, and more where there are errors"
        return Level(alpha=alpha, reason=reason, rows_needed=needed), None
    if not planned:
        return Level(alpha=alpha, reason="no variant stays within this level on the validation rows"), None
    errors = [unseen.errors(policy) for policy in planned]
    passed = certificates.fixed_sequence(errors, unseen.rows, alpha, delta)
    tests = [
        Tested(
            label=words(policy.steps),
            expected_cpu_ms=policy.cost_ms,
            tuned_disagreement=policy.disagreement,
            certificate=certificates.certify(count, unseen.rows, alpha, delta).model_copy(
                update={"batchings": unseen.batchings(policy)}
            ),
        )
        # What lies behind the first failure was not tested.
        for policy, count in zip(planned[: passed + 1], errors, strict=False)
    ]
    if not passed:
        bound = tests[0].certificate.upper_bound
        reason = f"the most conservative candidate ({tests[0].label}) failed its test: at most {bound:.2%} is certain"
        return Level(alpha=alpha, reason=reason, path=tests), None
    best = planned[passed - 1]
    point = OperatingPoint(
        id=f"within-{alpha:g}",
        steps=list(best.steps),
        certificate=tests[passed - 1].certificate,
        expected_cpu_ms=best.cost_ms,
        tuned_disagreement=best.disagreement,
    )
    return Level(alpha=alpha, point=point.id, path=tests), point


def notes(
    ways: str, levels: Sequence[Level], points: Sequence[OperatingPoint], delta: float, words: Words = in_words
) -> list[str]:
    """What was compared and what came of each level, in words."""
    found = [f"{ways} were compared on validation"]
    by_id = {point.id: point for point in points}
    for level in levels:
        if level.point is None:
            found.append(f"{level.alpha:.1%}: answered by the reference; {level.reason}")
            continue
        point = by_id[level.point]
        proof = point.certificate
        found.append(
            f"{level.alpha:.1%}: {words(point.steps)}, {point.expected_cpu_ms:.2f} ms a row; {proof.errors} of "
            f"{proof.rows} calibration rows changed, at most {proof.upper_bound:.2%} at confidence {1 - delta:.2%}"
        )
    return found


def _unseen(problem: Problem, stages: Stages) -> Unseen:
    def batchings(policy: Policy) -> Batchings:
        any_batching = all(len(stages[step.variant][0].wrong) == 1 for step in policy.steps)
        return "any" if any_batching else "worst of alone, mixed and full"

    return Unseen(
        rows=len(problem.calibration),
        errors=lambda policy: int(worst_errors(policy.steps, stages).sum()),
        self_changed=problem.self_changed,
        batchings=batchings,
    )


def _check(problem: Problem) -> None:
    names = [candidate.id for candidate in problem.candidates]
    if problem.reference not in names:
        raise PassError(f"the reference {problem.reference!r} is not among the candidates {', '.join(names)}")
    if len(set(names)) < len(names):
        raise PassError(f"two candidates have one name: {', '.join(names)}")
    if not len(problem.validation) or not len(problem.calibration):
        raise PassError("nothing can be certified without validation and calibration rows")
    for candidate in problem.candidates:
        for split, truth in (("validation", problem.validation), ("calibration", problem.calibration)):
            shape = (len(truth), len(candidate.stage_cpu_ms), problem.task.width)
            traces: Sequence[Floats] = getattr(candidate, split)
            if not traces or any(trace.shape != shape for trace in traces):
                found = ", ".join(str(trace.shape) for trace in traces) or "nothing"
                raise PassError(f"{candidate.id}: {split} should hold arrays of shape {shape}, found {found}")
