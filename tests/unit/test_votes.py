"""Votes: against every way in which what is left could turn out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fettle.errors import UsageError
from fettle.extract import Answer
from fettle.findings import Certificate, VotePoint
from fettle.generation import Finish, Sampling
from fettle.votes import VoteRule, Votes, certified

A, B, C = Answer("a"), Answer("b"), Answer("c")
NONE = Answer("no answer in here", found=False)
NEW = Answer("one that nobody has given")


def winner_of_all(row: Sequence[Answer]) -> Answer | None:
    counts = {answer: row.count(answer) for answer in row if answer.found}
    most = max(counts.values(), default=0)
    return next((answer for answer in row if answer.found and counts[answer] == most), None)


def known_by_brute_force(seen: dict[int, Answer], count: int) -> bool:
    """Whether all ways to fill what is left have one winner."""
    left = [choice for choice in range(count) if choice not in seen]
    others = {*seen.values(), NEW, NONE}
    winners = set()
    for filling in product(others, repeat=len(left)):
        row = seen | dict(zip(left, filling, strict=True))
        winners.add(winner_of_all([row[choice] for choice in range(count)]))
    return len(winners) == 1


def draw(row: Sequence[Answer], order: Sequence[int], confidence: float | None = None) -> tuple[Votes, int]:
    """Until it is settled, and how many votes that took."""
    votes = Votes(VoteRule(len(row), confidence))
    for number, choice in enumerate(order):
        finish = votes.see(choice, row[choice])
        if votes.settled:
            assert (finish is Finish.EARLY_VOTE) == (number + 1 < len(row))
            return votes, number + 1
        assert finish is None
    raise AssertionError("all have voted, and nothing is settled")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_the_lossless_form_gives_the_winner_of_all_and_not_a_vote_later_than_it_could(count: int):
    for row in product((A, B, C, NONE), repeat=count):
        votes, drawn = draw(row, range(count))
        assert votes.winner == winner_of_all(row)
        assert known_by_brute_force({choice: row[choice] for choice in range(drawn)}, count) or drawn == count
        if count < 6:
            assert not any(known_by_brute_force(dict(enumerate(row[:early])), count) for early in range(drawn))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_lossless_form_gives_it_in_whatever_order_the_choices_are_ready(count: int):
    for row in product((A, B, NONE), repeat=count):
        for order in permutations(range(count)):
            votes, drawn = draw(row, order)
            assert votes.winner == winner_of_all(row)
            assert not any(
                known_by_brute_force({choice: row[choice] for choice in order[:early]}, count) for early in range(drawn)
            )


@given(st.lists(st.sampled_from([A, B, C, NONE]), min_size=1, max_size=40), st.randoms())
def test_the_lossless_form_with_many_choices(row: list[Answer], chance):
    order = list(range(len(row)))
    chance.shuffle(order)
    assert draw(row, order)[0].winner == winner_of_all(row)


@given(st.lists(st.sampled_from([A, B, C, NONE]), min_size=2, max_size=24), st.floats(0.51, 0.999), st.randoms())
def test_with_a_confidence_it_ends_where_the_posterior_reaches_it_in_the_order_of_the_choices(row, confidence, chance):
    expected = None
    for drawn in range(1, len(row) + 1):
        counts = sorted((row[:drawn].count(answer) for answer in (A, B, C)), reverse=True)
        ahead, behind = counts[0], counts[1]
        sure = float(stats.beta.sf(0.5, ahead + 1, behind + 1))
        if abs(sure - confidence) < 1e-9:
            return
        lossless = Votes(VoteRule(len(row)))
        for choice in range(drawn):
            if not lossless.settled:
                lossless.see(choice, row[choice])
        if (ahead and sure >= confidence) or lossless.settled:
            expected = drawn
            break
    assert expected is not None
    votes, drawn = draw(row, range(len(row)), confidence)
    assert drawn == expected
    assert votes.winner == winner_of_all(row[:expected])
    # Whatever comes first, the same choices count.
    order = list(range(len(row)))
    chance.shuffle(order)
    late, _ = draw(row, order, confidence)
    assert late.winner == votes.winner
    assert late.wanted == votes.wanted == drawn


def test_sixteen_that_agree():
    assert draw([A] * 16, range(16))[1] == 8
    # 1 - 2 ** -(a + 1) is at least 0.95 from a = 4 on.
    assert draw([A] * 16, range(16), 0.95)[1] == 4


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_so_many_are_wanted_as_may_settle_it(confidence: float | None):
    for row in product((A, B, NONE), repeat=5):
        votes = Votes(VoteRule(5, confidence))
        for choice in range(6):
            least = next(
                count
                for count in range(choice, 6)
                if any(
                    settles(row[:choice] + filling, 5, confidence)
                    for filling in product((A, B, NONE), repeat=count - choice)
                )
            )
            assert votes.wanted == (choice if votes.settled else least)
            if votes.settled:
                break
            votes.see(choice, row[choice])


def settles(row: Sequence[Answer], count: int, confidence: float | None) -> bool:
    votes = Votes(VoteRule(count, confidence))
    for choice, answer in enumerate(row):
        votes.see(choice, answer)
    return votes.settled


def test_whose_text_is_given_back():
    votes = Votes(VoteRule(5))
    for choice, answer in ((4, A), (1, B), (3, A), (0, NONE)):
        votes.see(choice, answer)
    assert votes.winner == A
    assert votes.support == (3, 4)


def test_texts_without_an_answer_elect_nobody():
    votes, drawn = draw([NONE] * 3, range(3))
    assert (votes.winner, votes.support, drawn) == (None, (), 3)


def test_nobody_votes_twice():
    votes = Votes(VoteRule(3))
    votes.see(1, A)
    for choice in (1, 3, -1):
        with pytest.raises(UsageError):
            votes.see(choice, A)


@pytest.mark.parametrize(("choices", "confidence"), [(0, None), (3, 0.5), (3, 1.0), (3, 0.2)])
def test_rules_that_are_none(choices: int, confidence: float | None):
    with pytest.raises(UsageError):
        VoteRule(choices, confidence)


def point(alpha: float, drawn: float, choices: int = 16, temperature: float = 0.7) -> VotePoint:
    proof = Certificate(alpha=alpha, delta=0.05, errors=0, rows=1000, p_value=0.01, upper_bound=alpha / 2)
    return VotePoint(
        id=f"vote-within-{alpha:g}",
        choices=choices,
        confidence=0.9,
        temperature=temperature,
        drawn=drawn,
        certificate=proof,
    )


POINTS = [
    VotePoint(id="vote-lossless", choices=16, temperature=0.7, drawn=10),
    point(0.01, 6),
    point(0.05, 4),
    point(0.05, 2, choices=4),
]
WARM = Sampling(temperature=0.7)


@pytest.mark.parametrize(
    ("tolerance", "sampling", "choices", "chosen"),
    [
        (0.0, WARM, 16, None),
        (0.01, WARM, 16, "vote-within-0.01"),
        (0.2, Sampling(temperature=0.7, seed=4, logprobs=2), 16, "vote-within-0.05"),
        (0.2, Sampling(temperature=0.8), 16, None),
        (0.2, Sampling(temperature=0.7, top_p=0.9), 16, None),
        (0.2, Sampling(temperature=0.7, top_k=5), 16, None),
        (0.2, Sampling(temperature=0.7, logit_bias={1: 2.0}), 16, None),
        (0.2, Sampling(temperature=0.7, presence_penalty=0.1), 16, None),
        (0.2, WARM, 8, None),
    ],
)
def test_a_certificate_is_about_draws_of_one_kind(tolerance, sampling, choices, chosen):
    found = certified(POINTS, tolerance, sampling, choices)
    assert (found and found.id) == chosen
