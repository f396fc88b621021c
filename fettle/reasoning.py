"""A budget for reasoning: after so many tokens inside a think block, the tokens that close it are forced. Pure.

A budget changes what the model goes on to say, so no recorded text tells what another budget would give: each budget
that is to be certified is generated with, and is a candidate of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fettle.errors import UsageError
from fettle.generation import Constraint


@dataclass(frozen=True, slots=True)
class ThinkBudget:
    """How many tokens of reasoning, all blocks of a text together, and how a block looks in token ids.

    Attributes:
        opening, closing: what opens and closes a block when the model writes it.
        forced: what is written in the model's place when the budget is spent; it must end with `closing`.
        inside: the prompt has opened the block already, as some chat templates do.
    """

    tokens: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    forced: tuple[int, ...]
    inside: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UsageError(f"a budget of {self.tokens} tokens is none; give 0 or more")
        if not self.closing or not (self.opening or self.inside):
            raise UsageError("a think block needs tokens that close it, and tokens that open it or a prompt that does")
        if self.forced[-len(self.closing) :] != self.closing:
            raise UsageError("the tokens that are forced must end with those that close the block")


class Thinking:
    """Where one generation stands: `advance` with each token; `forced` says which one must come next, if any."""

    def __init__(self, budget: ThinkBudget) -> None:
        self.budget = budget
        self.inside = budget.inside
        self.spent = 0
        self._left: list[int] = []
        self._recent: list[int] = []
        self._force()

    @property
    def forced(self) -> int | None:
        return self._left[0] if self._left else None

    def advance(self, token: int) -> None:
        """The token was written, forced or not."""
        if self._left:
            # Should anything else have been written, it starts anew.
            self._left = self._left[1:] if token == self._left[0] else []
        elif self.inside:
            self.spent += 1
        wanted = self.budget.closing if self.inside else self.budget.opening
        self._recent = [*self._recent, token][-len(wanted) :] if wanted else []
        if wanted and tuple(self._recent) == wanted:
            self.inside = not self.inside
            self._recent, self._left = [], []
        if not self._left:
            self._force()

    def _force(self) -> None:
        if self.inside and self.spent >= self.budget.tokens:
            self._left = list(self.budget.forced)


class ThinkingConstraint:
    """The budget as a `fettle.generation.Constraint`; another constraint (a grammar) holds outside of think blocks.

    With such a grammar a block can only be opened by the prompt, since the grammar decides on the first token.
    """

    def __init__(self, budget: ThinkBudget, vocabulary: int, outside: Constraint | None = None) -> None:
        known = (*budget.opening, *budget.closing, *budget.forced)
        if not all(0 <= token < vocabulary for token in known):
            raise UsageError(f"a think block's tokens lie outside the vocabulary of {vocabulary}")
        self.thinking = Thinking(budget)
        self._outside = outside
        self._vocabulary = vocabulary

    def allowed(self) -> NDArray[np.bool_] | None:
        forced = self.thinking.forced
        if forced is not None:
            only = np.zeros(self._vocabulary, np.bool_)
            only[forced] = True
            return only
        return None if self._outside is None or self.thinking.inside else self._outside.allowed()

    def advance(self, token: int) -> None:
        was_inside = self.thinking.inside
        self.thinking.advance(token)
        if self._outside is not None and not was_inside:
            self._outside.advance(token)
