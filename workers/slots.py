"""Which generation is in which slot: pure bookkeeping, no tensors. What it decides, `workers/generator.py` has done.

Slots 0 to n - 1 are alive and decode together. One more may be filling: its prompt is fed in pieces. Whatever was in
the others is remembered until it is overwritten, so that a prompt with the same beginning need not feed it again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fettle.generation import Prompt, Token
from fettle.sampling import Draw
from workers.decoder import Ids

SMALLEST_CONTEXT = 128
# A shorter common beginning is not worth a copy.
SHORTEST_REUSE = 8
# Of a prompt, at least so many tokens are fed at once: for one alone an engine may take another path, whose results
# differ in the last digits.
SHORTEST_PIECE = 2


class Sequence:
    """One generation: its tokens so far, and how many of them are in its slot's keys and values (`fed`).

    The first `filled` of these were fed as a prompt; those behind them came one by one, and may differ in the last
    digits from what feeding would have made of them, so nothing else begins with them.
    """

    __slots__ = ("_tokens", "cached", "draw", "fed", "filled", "length", "order", "prompt", "scored", "told")

    def __init__(self, prompt: Prompt, draw: Draw, order: int, context: int) -> None:
        self.prompt = prompt
        self.draw = draw
        self.order = order
        self.fed = 0
        self.filled = 0
        self.cached = 0
        self.told = False
        self.scored: list[Token] = []
        self.length = len(prompt.ids)
        self._tokens = np.empty(min(context, self.length + prompt.max_tokens), np.int32)
        self._tokens[: self.length] = prompt.ids

    @property
    def tokens(self) -> Ids:
        """Prompt and output, int32 [length]; a view."""
        return self._tokens[: self.length]

    @property
    def reusable(self) -> Ids:
        """The tokens that another text may begin with, int32 [filled]; a view."""
        return self._tokens[: self.filled]

    @property
    def generated(self) -> int:
        return self.length - len(self.prompt.ids)

    @property
    def urgency(self) -> tuple[int, int]:
        """Lower goes first, and is preempted last."""
        return self.prompt.priority, self.order

    def append(self, token: int) -> None:
        self._tokens[self.length] = token
        self.length += 1


@dataclass(frozen=True, slots=True)
class Copy:
    """Give slot `target` the first `length` positions of slot `source`."""

    source: int
    target: int
    length: int


@dataclass(slots=True)
class Slots:
    """Room for `count` slots of `context` tokens, in memory for `tokens` of them, at most `most` slots.

    Attributes:
        longest: what the model can do; no slot needs more.
        alive: by slot.
        filling: the one whose prompt is being fed, in slot `filling_at`.
        waiting: those without a slot, the next one first.
    """

    tokens: int
    longest: int
    most: int
    count: int = 0
    context: int = 0
    alive: list[Sequence] = field(default_factory=list)
    filling: Sequence | None = None
    filling_at: int = 0
    waiting: list[Sequence] = field(default_factory=list)
    _left: dict[int, Ids] = field(default_factory=dict)

    @property
    def held(self) -> int:
        return len(self.alive) + (self.filling is not None)

    @property
    def used(self) -> int:
        """Tokens of those that have a slot."""
        filling = self.filling
        return sum(sequence.fed for sequence in list(self.alive)) + (filling.fed if filling is not None else 0)

    def wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_urgency)

    def shape_for(self, tokens: Iterable[int]) -> tuple[int, int]:
        """(count, context) that hold sequences of so many tokens: contexts in powers of two, as many slots as fit."""
        needed = max(tokens, default=0)
        context = SMALLEST_CONTEXT
        while context < needed:
            context *= 2
        context = min(context, self.longest)
        return max(1, min(self.most, self.tokens // context)), context

    def reshape(self, count: int, context: int) -> None:
        """The memory has this shape now; what no longer fits is forgotten."""
        self.count, self.context = count, context
        self._left = {slot: ids[:context] for slot, ids in self._left.items() if slot < count}

    def gather(self, count: int) -> Copy | None:
        """Before fewer slots: brings the one that is filling into one that stays."""
        if self.filling is None or self.filling_at < count:
            return None
        source, self.filling_at = self.filling_at, len(self.alive)
        return Copy(source, self.filling_at, self.filling.fed)

    def victim(self) -> Sequence:
        """Who gives up its slot first."""
        return max((*self.alive, *([self.filling] if self.filling else [])), key=_urgency)

    def place(self, sequence: Sequence) -> Copy | None:
        """Give a free slot to be filled: the one that holds most of its beginning; says what to copy from elsewhere.

        Afterwards `sequence.fed` tokens are there already; never all, since the last one's logits are needed.
        """
        most = 0 if sequence.prompt.prompt_logprobs else max(0, sequence.length - SHORTEST_PIECE)
        free = range(len(self.alive), self.count)
        tokens = sequence.tokens[:most]
        here = {slot: _common(self._left[slot], tokens) for slot in free if slot in self._left}
        there = {slot: _common(other.reusable, tokens) for slot, other in enumerate(self.alive)}
        best, known = max(here.items(), key=_second, default=(0, 0))
        source, elsewhere = max(there.items(), key=_second, default=(0, 0))
        emptiest = min(free, key=lambda slot: len(self._left.get(slot, ())))
        self.filling, copy = sequence, None
        if max(known, elsewhere) < SHORTEST_REUSE:
            self.filling_at, sequence.fed = emptiest, 0
        elif known >= elsewhere:
            self.filling_at, sequence.fed = best, known
        else:
            self.filling_at, sequence.fed = emptiest, elsewhere
            copy = Copy(source, emptiest, elsewhere)
        sequence.filled = sequence.fed
        self._left.pop(self.filling_at, None)
        return copy

    def join(self) -> Copy | None:
        """The one that was filled decodes from now on, in the next slot."""
        assert self.filling is not None
        target, copy = len(self.alive), None
        if self.filling_at != target:
            copy = Copy(self.filling_at, target, self.filling.fed)
            self._left[self.filling_at] = self.filling.reusable.copy()
        self._left.pop(target, None)
        self.alive.append(self.filling)
        self.filling = None
        return copy

    def leave(self, sequence: Sequence) -> Copy | None:
        """It has no slot, and does not wait, any more. The last of the alive moves into its slot."""
        if sequence is self.filling:
            self._left[self.filling_at] = sequence.reusable.copy()
            self.filling = None
            return None
        if sequence not in self.alive:
            self.waiting.remove(sequence)
            return None
        slot, last = self.alive.index(sequence), len(self.alive) - 1
        moved = self.alive.pop()
        self._left[last] = moved.reusable.copy()
        if moved is sequence:
            return None
        self.alive[slot] = moved
        return Copy(last, slot, moved.fed)


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.urgency


def _second(pair: tuple[int, int]) -> int:
    return pair[1]


def _common(left: Ids, right: Ids) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(left), len(right))
    different = np.flatnonzero(left[:size] != right[:size])
    return int(different[0]) if len(different) else size
