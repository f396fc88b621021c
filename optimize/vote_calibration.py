"""How early a vote among sampled answers may end: replayed on rows with all their choices, certified like the rest.

A vote that ends early changes something where its leader is not the winner of all choices. The path is fixed before any
row is seen, from the lossless form to ever lower confidence, so no tuning rows are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fettle import certificates
from fettle.errors import PassError
from fettle.extract import Answer
from fettle.findings import Certificate, Level, VotePoint
from fettle.votes import VoteRule, Votes
from optimize.certify import DELTA

CONFIDENCES: Final = (0.9999, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6)


@dataclass(frozen=True, slots=True)
class VoteRows:
    """Every row's answers, all of its choices in order, and how they were sampled."""

    answers: Sequence[Sequence[Answer]]
    temperature: float
    top_p: float = 1.0

    @property
    def choices(self) -> int:
        return len(self.answers[0])


@dataclass(frozen=True, slots=True)
class Ended:
    """By row: how many choices were drawn until the winner was settled, and whether it is another than that of all."""

    drawn: NDArray[np.int64]
    changed: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CertifiedVotes:
    """`lossless` needs no certificate; `points` at the levels that have one; `paths` [level] is all that was tested."""

    lossless: VotePoint
    points: list[VotePoint]
    levels: list[Level]
    paths: list[list[VotePoint]]


def end_votes(answers: Sequence[Sequence[Answer]], confidences: Sequence[float | None]) -> list[Ended]:
    """For each confidence: draw every row's choices in order until its vote is settled."""
    winners = [_vote(row, None)[0] for row in answers]
    found = []
    for confidence in confidences:
        votes = [_vote(row, confidence) for row in answers]
        changed = [vote[0] != winner for vote, winner in zip(votes, winners, strict=True)]
        found.append(Ended(np.array([vote[1] for vote in votes], np.int64), np.array(changed, np.bool_)))
    return found


def certify_votes(rows: VoteRows, levels: Sequence[float], delta: float = DELTA) -> CertifiedVotes:
    """At each level the lowest confidence that passes, in order from the highest; the first failure ends it.

    Raises:
        PassError: there are no rows, or not all have as many choices.
    """
    if not rows.answers or any(len(row) != rows.choices for row in rows.answers) or rows.choices < 2:
        raise PassError("votes are calibrated on rows that all have the same number of choices, two or more")
    lossless, *ended = end_votes(rows.answers, (None, *CONFIDENCES))
    points, done, paths = [], [], []
    for alpha in levels:
        level, path = _certify_level(rows, ended, alpha, delta)
        done.append(level)
        paths.append(path)
        points += [point for point in path if point.id == level.point]
    return CertifiedVotes(_point(rows, "vote-lossless", lossless), points, done, paths)


def _certify_level(rows: VoteRows, ended: Sequence[Ended], alpha: float, delta: float) -> tuple[Level, list[VotePoint]]:
    count, needed = len(rows.answers), certificates.rows_needed(alpha, delta)
    if count < needed:
        reason = f"{count} rows of choices are too few: it takes {needed} at the least"
        return Level(alpha=alpha, reason=reason, rows_needed=needed), []
    errors = [int(found.changed.sum()) for found in ended]
    passed = certificates.fixed_sequence(errors, count, alpha, delta)
    name = f"vote-within-{alpha:g}"
    path = [
        _point(
            rows,
            name if number == passed - 1 else f"{name}-at-{CONFIDENCES[number]:g}",
            ended[number],
            CONFIDENCES[number],
            certificates.certify(wrong, count, alpha, delta),
        )
        # What lies behind the first failure was not tested.
        for number, wrong in enumerate(errors[: passed + 1])
    ]
    if not passed:
        bound = certificates.upper_bound(errors[0], count, delta)
        reason = f"even confidence {CONFIDENCES[0]:g} failed its test: at most {bound:.2%} is certain"
        return Level(alpha=alpha, reason=reason), path
    return Level(alpha=alpha, point=name), path


def _point(
    rows: VoteRows, name: str, ended: Ended, confidence: float | None = None, proof: Certificate | None = None
) -> VotePoint:
    return VotePoint(
        id=name,
        choices=rows.choices,
        confidence=confidence,
        temperature=rows.temperature,
        top_p=rows.top_p,
        drawn=float(ended.drawn.mean()),
        certificate=proof,
    )


def _vote(row: Sequence[Answer], confidence: float | None) -> tuple[Answer | None, int]:
    """The winner, and how many choices were drawn for it."""
    votes = Votes(VoteRule(len(row), confidence))
    for choice, answer in enumerate(row):
        votes.see(choice, answer)
        if votes.settled:
            return votes.winner, choice + 1
    return votes.winner, len(row)
