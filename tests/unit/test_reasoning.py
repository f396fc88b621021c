"""The budget for reasoning: what is forced, when, and through a real step loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.errors import UsageError
from fettle.generation import GREEDY, Prompt
from fettle.reasoning import ThinkBudget, Thinking, ThinkingConstraint
from tests.fake_text import fake_manifest
from workers.fake_decoder import FakeRunner
from workers.generator import Generator

OPEN, CLOSE, BREAK = 1, 2, 3
BUDGET = ThinkBudget(tokens=3, opening=(OPEN,), closing=(CLOSE,), forced=(BREAK, CLOSE))


def written(budget: ThinkBudget, drawn: list[int], count: int) -> list[int]:
    """What comes out if the model would draw these, and then zeros."""
    thinking, out, wishes = Thinking(budget), [], iter(drawn)
    while len(out) < count:
        token = thinking.forced if thinking.forced is not None else next(wishes, 0)
        thinking.advance(token)
        out.append(token)
    return out


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ([9, 9, 9, 9, 9], [9, 9, 9, 9, 9]),
        ([OPEN, 9, CLOSE, 9, 9], [OPEN, 9, CLOSE, 9, 9]),
        ([OPEN, 9, 9, 9, 9, 9], [OPEN, 9, 9, 9, BREAK, CLOSE, 9, 9]),
        # The end comes just in time.
        ([OPEN, 9, 9, CLOSE, 9], [OPEN, 9, 9, CLOSE, 9]),
        # All blocks share one budget; the second is closed when what is left of it is spent.
        ([OPEN, 9, CLOSE, OPEN, 9, 9], [OPEN, 9, CLOSE, OPEN, 9, BREAK, CLOSE, 9]),
        ([OPEN, 9, 9, 9, 9, OPEN, 9], [OPEN, 9, 9, 9, BREAK, CLOSE, 9, OPEN, BREAK, CLOSE, 9]),
    ],
)
def test_the_block_is_closed_when_the_budget_is_spent(drawn: list[int], expected: list[int]):
    assert written(BUDGET, drawn, len(expected)) == expected


def test_a_prompt_that_has_opened_the_block_and_a_budget_of_nothing():
    inside = ThinkBudget(tokens=2, opening=(), closing=(CLOSE,), forced=(CLOSE,), inside=True)
    assert written(inside, [9, 9, 9], 4) == [9, 9, CLOSE, 9]
    nothing = ThinkBudget(tokens=0, opening=(OPEN,), closing=(CLOSE,), forced=(CLOSE,))
    assert written(nothing, [9, OPEN, 9], 4) == [9, OPEN, CLOSE, 9]


def test_ends_of_several_tokens():
    budget = ThinkBudget(tokens=3, opening=(7, 8), closing=(8, 7), forced=(5, 8, 7))
    assert written(budget, [7, 9, 8, 7, 8, 1, 8, 7, 6], 9) == [7, 9, 8, 7, 8, 1, 8, 7, 6]
    assert written(budget, [7, 8, 8, 8, 8], 8) == [7, 8, 8, 8, 8, 5, 8, 7]


@given(st.lists(st.sampled_from([OPEN, CLOSE, BREAK, 8, 9]), max_size=40), st.integers(0, 6))
def test_never_more_than_the_budget_is_thought(drawn: list[int], tokens: int):
    budget = ThinkBudget(tokens=tokens, opening=(OPEN,), closing=(CLOSE,), forced=(BREAK, CLOSE))
    thinking = Thinking(budget)
    for token in drawn:
        if thinking.forced is not None:
            assert thinking.spent == tokens
            assert thinking.inside
        thinking.advance(token if thinking.forced is None else thinking.forced)
        assert thinking.spent <= tokens
    assert not (thinking.inside and thinking.spent == tokens and thinking.forced is None)


class OnlyNines:
    """A grammar that counts."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(20) == 9

    def advance(self, token: int) -> None:
        self.seen.append(token)


def test_a_grammar_holds_outside_of_the_block_alone():
    grammar = OnlyNines()
    inside = ThinkBudget(tokens=2, opening=(), closing=(CLOSE,), forced=(CLOSE,), inside=True)
    constraint = ThinkingConstraint(inside, 20, grammar)
    assert constraint.allowed() is None
    for token in (5, 6):
        constraint.advance(token)
    mask = constraint.allowed()
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [CLOSE]
    constraint.advance(CLOSE)
    mask = constraint.allowed()
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [9]
    constraint.advance(9)
    assert grammar.seen == [9]


def test_without_a_grammar_nothing_is_masked_outside():
    assert ThinkingConstraint(BUDGET, 20).allowed() is None


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_through_the_step_loop(tokens: int):
    """The same text up to the budget, then the forced end, then what the model makes of that."""
    free = generated(None)
    # Tokens that the model does not write by itself.
    close, rest = (token for token in (40, 41) if token not in free)
    budget = ThinkBudget(tokens=tokens, opening=(), closing=(close,), forced=(rest, close), inside=True)
    forced = generated(ThinkingConstraint(budget, 50))
    assert forced[: tokens + 2] == [*free[:tokens], rest, close]
    assert len(forced) == len(free)


def generated(constraint: ThinkingConstraint | None) -> list[int]:
    runner = FakeRunner(fake_manifest(vocabulary=50, context=64))
    engine = Generator(runner, memory_bytes=64 * runner.bytes_per_token)
    engine.submit(Prompt("a", np.array([5, 6], np.int32), 12, GREEDY, constraint=constraint))
    tokens: list[int] = []
    while engine.busy:
        tokens += [token.id for step in engine.step() for token in step.tokens]
    return tokens


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": -1},
        {"closing": ()},
        {"opening": ()},
        {"forced": (BREAK,)},
        {"forced": ()},
    ],
)
def test_budgets_that_are_none(wrong: dict):
    good = {"tokens": 1, "opening": (OPEN,), "closing": (CLOSE,), "forced": (CLOSE,)}
    ThinkBudget(**good)
    with pytest.raises(UsageError):
        ThinkBudget(**(good | wrong))


def test_tokens_that_the_vocabulary_lacks():
    with pytest.raises(UsageError):
        ThinkingConstraint(BUDGET, 3)
