"""Which operating points for texts may be promised: found on `validation`, tested on `calibration`, level by level.

As `optimize.certify` does it for encoders, and with its tests. The reference's answer is what its own full generation
says; an early stop, a cascade and giving up are one black box that either gives this answer or does not. Generations
are recorded in full once (`fettle.text_trace`), on the engine that serves; a variant with a budget for its reasoning
is a candidate of its own, since a budget changes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from fettle.errors import PassError
from fettle.extract import Answer, Extract
from fettle.findings import Level, OperatingPoint, Step, StopGates
from fettle.text_trace import Trace
from optimize.certify import BUDGETS, DELTA, Unseen, certify_level, notes, path
from optimize.text_search import evaluated, give_up, search
from optimize.text_tables import Table, TokenCosts, evaluate, figures
from optimize.thresholds import Policy

LEVELS: Final = (0.01, 0.02, 0.05)
SPLITS: Final = ("validation", "calibration")

Split = Literal["validation", "calibration"]


@dataclass(frozen=True, slots=True)
class TextCandidate:
    """A variant, what its tokens cost, and its full greedy generations on both splits, a row each."""

    id: str
    costs: TokenCosts
    validation: Sequence[Trace]
    calibration: Sequence[Trace]


@dataclass(frozen=True, slots=True)
class TextProblem:
    """What is to be certified. `reference` names the candidate that is the reference, `extract` reads the answers.

    Where that candidate only stands for the reference (the same weights on another engine), `truth` has the reference's
    own answers by split. `self_changed` is the share of answers in which the reference disagrees with itself.
    `stops_at_answers` is false where the service does not read answers (by a function of the user's), so that no point
    may depend on it.
    """

    reference: str
    candidates: Sequence[TextCandidate]
    extract: Extract
    self_changed: float = 0.0
    truth: Mapping[Split, Sequence[Answer]] | None = None
    stops_at_answers: bool = True

    def answers(self, split: Split) -> list[Answer]:
        """The reference's, from its full generations."""
        if self.truth is not None:
            return list(self.truth[split])
        reference = next(candidate for candidate in self.candidates if candidate.id == self.reference)
        return [self.extract(trace.text) for trace in getattr(reference, split)]


@dataclass(frozen=True, slots=True)
class TextCertified:
    """`points` in the order of the levels that have one, each with its figures on validation; `notes` in words."""

    points: list[OperatingPoint]
    levels: list[Level]
    notes: list[str]


def certify_texts(
    problem: TextProblem,
    levels: Sequence[float] = LEVELS,
    delta: float = DELTA,
    *,
    simultaneous: bool = False,
    report: Callable[[float], None] = lambda _: None,
) -> TextCertified:
    """Search and test. One thread, about half a minute for two variants and some thousand short texts.

    Raises:
        PassError: the candidates' traces do not fit together, or the reference is not among them.
    """
    _check(problem)
    each = delta / len(levels) if simultaneous else delta
    tables = tables_of(problem, "validation")
    policies = plan(tables, problem.reference, levels)
    report(0.7)
    held_out = tables_of(problem, "calibration")
    unseen = Unseen(
        rows=len(held_out[problem.reference]),
        errors=lambda policy: int(evaluate(policy.steps, held_out).wrong.sum()),
        self_changed=problem.self_changed,
    )
    points, done = [], []
    for number, alpha in enumerate(levels):
        level, point = certify_level(policies[alpha], unseen, alpha, each, text_in_words)
        done.append(level)
        if point is not None:
            points.append(point.model_copy(update={"text": figures(point.steps, tables, problem.reference)}))
        report(0.7 + 0.3 * (number + 1) / len(levels))
    ways = f"early stops of {len(tables)} variants, and cascades to the reference,"
    return TextCertified(points, done, notes(ways, done, points, each, text_in_words))


def plan(tables: Mapping[str, Table], reference: str, levels: Sequence[float]) -> dict[float, list[Policy]]:
    """For each level the policies to be tested, from conservative to aggressive, from the tuning rows alone."""
    budgets = sorted({share * alpha for alpha in levels for share in BUDGETS})
    found = search(tables, reference, budgets)
    # Giving up moves costs, and answers too where the reference stops early; so the paths are made of what it gives.
    policies = [evaluated(policy.steps, tables) for policy in found] + [give_up(policy, tables) for policy in found]
    return {alpha: path(policies, alpha) for alpha in levels}


def tables_of(problem: TextProblem, split: Split) -> dict[str, Table]:
    answers = problem.answers(split)
    return {
        candidate.id: Table(
            getattr(candidate, split),
            candidate.costs,
            answers,
            problem.extract,
            stops_at_answers=problem.stops_at_answers,
        )
        for candidate in problem.candidates
    }


def text_in_words(steps: Sequence[Step]) -> str:
    """Variants with how they are stopped and taken, such as `int4 (answer 0.930, accept 0.812) > fp32`."""
    parts = []
    for number, step in enumerate(steps):
        said = stop_in_words(step.text) if step.text is not None else []
        if number < len(steps) - 1:
            said.append(f"accept {step.gates[-1].threshold:.3f}")
            if step.text is not None and step.text.floors:
                said.append(f"give up after {', '.join(str(floor.after) for floor in step.text.floors)}")
        parts.append(f"{step.variant} ({', '.join(said)})" if said else step.variant)
    return " > ".join(parts)


def stop_in_words(stop: StopGates) -> list[str]:
    said = []
    if stop.end is not None:
        said.append(f"end {stop.end.threshold:.3f}")
    if stop.answer is not None:
        times = f" x{stop.answer.stable}" if stop.answer.stable > 1 else ""
        said.append(f"answer {stop.answer.threshold:.3f}{times}")
    return said


def _check(problem: TextProblem) -> None:
    names = [candidate.id for candidate in problem.candidates]
    if problem.reference not in names:
        raise PassError(f"the reference {problem.reference!r} is not among the candidates {', '.join(names)}")
    if len(set(names)) < len(names):
        raise PassError(f"two candidates have one name: {', '.join(names)}")
    for split in SPLITS:
        counts = {candidate.id: len(getattr(candidate, split)) for candidate in problem.candidates}
        if len(set(counts.values())) > 1 or not min(counts.values()):
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise PassError(f"{split} needs a trace of every row from every candidate; found {found}")
