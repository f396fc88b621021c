"""Certified votes: replayed against the definition, and the promise in simulations with a known risk."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fettle.certificates import fixed_sequence, holds, p_value
from fettle.errors import PassError
from fettle.extract import Answer
from fettle.votes import VoteRule, Votes
from optimize.vote_calibration import CONFIDENCES, VoteRows, certify_votes, end_votes

CHOICES = 16


def drawn(rows: int, seed: int) -> list[list[Answer]]:
    """Most prompts have a clear answer, some are torn between two or three."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rows):
        shares = rng.dirichlet([6.0, 0.8, 0.4])
        found.append([Answer(f"label{number}") for number in rng.choice(3, CHOICES, p=shares)])
    return found


def winner_of(row: list[Answer]) -> Answer:
    counts = {answer: row.count(answer) for answer in row}
    return max(row, key=lambda answer: (counts[answer], -row.index(answer)))


@pytest.fixture(scope="module")
def rows() -> list[list[Answer]]:
    return drawn(1500, 0)


def test_lossless_votes_change_nothing_and_draw_fewer(rows):
    (ended,) = end_votes(rows, [None])
    assert not ended.changed.any()
    assert ended.drawn.min() >= 8
    assert ended.drawn.mean() < 12


@pytest.mark.parametrize("confidence", [0.999, 0.95, 0.7])
def test_what_changes_is_counted_against_the_winner_of_all(rows, confidence: float):
    (ended,) = end_votes(rows, [confidence])
    for row, count, changed in zip(rows, ended.drawn.tolist(), ended.changed.tolist(), strict=True):
        votes = Votes(VoteRule(CHOICES, confidence))
        for choice in range(count):
            assert not votes.settled
            votes.see(choice, row[choice])
        assert votes.settled
        assert changed == (votes.winner != winner_of(row))


def test_the_certified_confidence_is_the_last_that_passes(rows):
    found = certify_votes(VoteRows(rows, temperature=1.0), (0.01, 0.02, 0.05))
    assert found.lossless.certificate is None
    assert [level.alpha for level in found.levels] == [0.01, 0.02, 0.05]
    assert {point.id for point in found.points} == {level.point for level in found.levels if level.point}
    assert found.points
    ended = dict(zip(CONFIDENCES, end_votes(rows, CONFIDENCES), strict=True))
    before = found.lossless.drawn
    for point in found.points:
        proof = point.certificate
        assert proof is not None
        assert point.confidence in CONFIDENCES
        assert proof.errors == ended[point.confidence].changed.sum()
        assert p_value(proof.errors, 1500, proof.alpha) <= 0.05
        lower = CONFIDENCES[CONFIDENCES.index(point.confidence) + 1]
        assert p_value(int(ended[lower].changed.sum()), 1500, proof.alpha) > 0.05
        assert point.drawn <= before
        before = point.drawn
    for path, point in zip(found.paths, found.points, strict=True):
        assert [tested.confidence for tested in path] == list(CONFIDENCES[: len(path)])
        assert path[-2] == point
        assert not holds(path[-1].certificate)


def test_the_promise_is_kept_and_the_naive_rule_breaks_it():
    everyone = drawn(4000, 1)
    path = CONFIDENCES[4:]
    changed = np.stack([ended.changed for ended in end_votes(everyone, path)])
    risks = changed.mean(axis=1)
    # One confidence of the path just misses the level.
    count, runs, alpha = 600, 1000, float(risks[-3]) * 0.97
    rng = np.random.default_rng(2)
    broken = naive_broken = 0
    for _ in range(runs):
        errors = changed[:, rng.choice(len(everyone), count)].sum(axis=1).tolist()
        passed = fixed_sequence(errors, count, alpha, 0.05)
        naive = [number for number, wrong in enumerate(errors) if wrong <= alpha * count]
        broken += passed > 0 and risks[passed - 1] > alpha
        naive_broken += bool(naive) and risks[naive[-1]] > alpha
    assert broken / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert naive_broken / runs > 0.3


def test_too_few_rows_and_rows_that_are_too_torn(rows):
    few = certify_votes(VoteRows(rows[:100], temperature=1.0), (0.01,))
    assert (few.points, few.levels[0].rows_needed) == ([], 299)
    # The leader of the first twelve, whom even the highest confidence believes, loses by the last twenty.
    late = [[Answer("a")] * 14 + [Answer("b")] * 20] * 300
    found = certify_votes(VoteRows(late, temperature=1.0), (0.02,))
    assert (found.points, len(found.paths[0])) == ([], 1)
    assert "failed its test" in str(found.levels[0].reason)


@pytest.mark.parametrize("answers", [[], [[Answer("a")]], [[Answer("a")] * 2, [Answer("a")] * 3]])
def test_rows_that_are_no_votes(answers: list[list[Answer]]):
    with pytest.raises(PassError):
        certify_votes(VoteRows(answers, temperature=1.0), (0.05,))
