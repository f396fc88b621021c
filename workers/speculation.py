"""Guessing the next tokens of a generation, so that a dear model checks several at once; and whether that pays.

Whatever is guessed, the text stays what it would have been (`Generator._verify`). Two ways to guess: what followed the
last tokens when they stood in the text before (prompt look-up), and a cheap variant of the same family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import numpy as np

from fettle.drafting import LENGTHS
from workers.decoder import Ids, Runner

LONGEST_MATCH = 4
# Of what was observed, how much a turn leaves of the earlier ones.
KEPT = 0.95
# Turns of a way before it is judged.
ENOUGH = 6
# After so many turns another way is tried anew, so that all paces stay known; more seldom while guessing does not pay,
# since a draft model that was not asked has to read what it missed.
AGAIN, SELDOM = 64, 1024
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
class Pace:
    """Seconds for a token; the newest turns count most."""

    turns: int = 0
    _seconds: float = 0.0
    _tokens: float = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        self.turns += 1
        self._seconds = KEPT * self._seconds + seconds
        self._tokens = KEPT * self._tokens + tokens

    @property
    def token_s(self) -> float:
        return self._seconds / self._tokens if self._tokens else inf


@dataclass(frozen=True, slots=True)
class Way:
    """One of the drafters, by its place, and how many tokens it is asked for."""

    drafter: int
    length: int


@dataclass(slots=True)
class Speculation:
    """Drafters, and when to use which: the way that takes least time for a token, plain decoding among them.

    What a way takes is measured, with the drafter's own time and with guesses that were wrong.
    """

    drafters: Sequence[Drafter]
    _plain: Pace = field(default_factory=Pace)
    _ways: dict[Way, Pace] = field(init=False)
    _used: Way = field(init=False)
    _turn: int = 0
    _gap: int = AGAIN
    _look: int = AGAIN
    _looks: int = 0

    def __post_init__(self) -> None:
        self._ways = {Way(place, length): Pace() for place in range(len(self.drafters)) for length in LENGTHS}
        self._used = next(iter(self._ways))

    @property
    def pays(self) -> bool:
        """True while there is a way that is not known yet, or that is faster than plain decoding."""
        return bool(self._open() or self._faster())

    def propose(self, tokens: Ids, most: int) -> Ids:
        """What may follow `tokens` int32 [n]; nothing while that does not pay, or while the plain pace is not known.

        `decoded` or `verified` has to be told what came of it.
        """
        if most <= 0 or not self._plain.turns:
            return NOTHING
        self._turn += 1
        for way in self._turns_ways():
            guess = self.drafters[way.drafter].propose(tokens, min(most, way.length))
            if len(guess):
                self._used = way
                return guess
        return NOTHING

    def decoded(self, seconds: float) -> None:
        """One token was decoded without a guess."""
        self._plain.add(seconds, 1)

    def verified(self, accepted: int, seconds: float) -> None:
        """So many of the tokens that were proposed were right; to draft and to check took so long."""
        self._ways[self._used].add(seconds, 1 + accepted)

    def _turns_ways(self) -> Sequence[Way]:
        """To be tried in this order, until one has a guess."""
        faster = self._faster()
        known = [way for way, pace in self._ways.items() if pace.turns >= ENOUGH]
        if self._turn < self._look or not known:
            return [*self._open(), *faster]
        self._gap = AGAIN if faster else min(2 * self._gap, SELDOM)
        self._look = self._turn + self._gap
        self._looks += 1
        others = [None, *known] if faster else known
        other = others[self._looks % len(others)]
        if other is None:
            return []
        self._ways[other] = Pace()
        return [other]

    def _open(self) -> list[Way]:
        return [way for way, pace in self._ways.items() if pace.turns < ENOUGH]

    def _faster(self) -> list[Way]:
        paces = {way: pace.token_s for way, pace in self._ways.items() if pace.turns >= ENOUGH}
        return sorted((way for way, pace in paces.items() if pace < self._plain.token_s), key=paces.__getitem__)
