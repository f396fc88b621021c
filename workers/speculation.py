"""Guessing the next tokens of a generation, so that a dear model checks several at once; and whether that pays.

Whatever is guessed, the text stays what it would have been (`Generator._verify`). Two ways to guess: what followed the
last tokens when they stood in the text before (prompt look-up), and a cheap variant of the same family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from workers.decoder import Ids, Runner

MOST = 8
LONGEST_MATCH = 4
# Of a running mean, the newest observation.
WEIGHT = 0.1
# One in so many turns is done the other way, so that both paces stay known.
AGAIN = 64
NOTHING = np.empty(0, np.int32)


class Drafter(Protocol):
    def propose(self, tokens: Ids, most: int) -> Ids:
        """At most so many tokens that may follow `tokens` int32 [n]; none if there is no good guess."""
        ...


class PromptLookup:
    """What followed the last few tokens where they stood before: good for answers that quote their prompt."""

    def propose(self, tokens: Ids, most: int) -> Ids:
        for size in range(min(LONGEST_MATCH, len(tokens) - 1), 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
            found = np.flatnonzero((windows == tokens[-size:]).all(axis=1))
            if len(found):
                after = int(found[-1]) + size
                return tokens[after : after + most].copy()
        return NOTHING


class DraftModel:
    """A cheap variant's most likely tokens. It keeps its own keys and values, of one generation at a time."""

    def __init__(self, runner: Runner, context: int) -> None:
        self._runner = runner
        self._known = NOTHING
        runner.allocate(1, context)

    def propose(self, tokens: Ids, most: int) -> Ids:
        most = min(most, self._runner.context - len(tokens) - 1)
        if most <= 0:
            return NOTHING
        size = min(len(self._known), len(tokens) - 1)
        different = np.flatnonzero(self._known[:size] != tokens[:size])
        begin = int(different[0]) if len(different) else size
        logits = self._runner.feed(0, tokens[begin:], begin, 1)
        guess = [int(logits[-1].argmax())]
        while len(guess) < most:
            fed = np.array([len(tokens) + len(guess) - 1], np.int32)
            logits = self._runner.decode(np.array(guess[-1:], np.int32), fed)
            guess.append(int(logits[0].argmax()))
        drafted = np.array(guess, np.int32)
        self._known = np.concatenate([tokens, drafted[:-1]])
        return drafted


@dataclass(slots=True)
class Speculation:
    """A drafter, used while it pays: while a checked token takes less time than one that is simply decoded."""

    drafter: Drafter
    most: int = MOST
    _plain_s: float | None = None
    _checked_s: float | None = None
    _gained: float = 0.0
    _turn: int = 0

    @property
    def pays(self) -> bool:
        """True until both ways were timed."""
        if self._plain_s is None or self._checked_s is None:
            return True
        return self._checked_s / (1 + self._gained) < self._plain_s

    def propose(self, tokens: Ids, most: int) -> Ids:
        """See Drafter; nothing while guessing does not pay, or while its plain pace is not known."""
        if most <= 0 or self._plain_s is None:
            return NOTHING
        self._turn += 1
        rare = self._turn % AGAIN == 0
        if rare == self.pays:
            return NOTHING
        return self.drafter.propose(tokens, min(most, self.most))

    def decoded(self, seconds: float) -> None:
        """One token was decoded without a guess."""
        self._plain_s = _mean(self._plain_s, seconds)

    def verified(self, guessed: int, accepted: int, seconds: float) -> None:
        """So many of the guessed tokens were right; the check took so long."""
        if guessed:
            self._checked_s = _mean(self._checked_s, seconds)
            self._gained += WEIGHT * (accepted - self._gained)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + WEIGHT * (new - before)
