"""From one step's logits to each generation's next token; numpy alone, and a generation's outcome is its own.

What is done to a row, with the meaning and in the order of vLLM's sampler: end tokens that come too early, logit
bias, penalties and grammar; then, unless it is greedy, temperature, min_p, top_k and top_p, and a draw from what is
left. Rows are worked on one by one, and the draw is a hash of (seed, choice, position), so nothing depends on who
shares the batch, on the order of rows, or on what was preempted and fed again. Log-probabilities are of the logits as
the model gave them.

Which row belongs to which generation, and when one ends for other reasons, is the step loop's (`workers/generator.py`).
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fettle.errors import EngineError, FettleError, RequestError
from fettle.generation import Finish, Prompt, Token

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

# A token; or the end of a text whose grammar is complete; or why this row, and no other, has no next token.
Outcome = Token | Finish | FettleError

# Weights are added up by blocks of so many before one is looked at closely, since running sums are slow.
BLOCK = 256
# So many weights are sorted at once; more are first narrowed down, by a sample and how far its ranks may be off.
SORTED = 2048
SAMPLE = 1024
MARGIN = 64
# Maxima of so many groups of values, at least, tell which values cannot be among the largest.
GROUPS = 512
# 1 / temperature, at most: more is greedy anyway, and float32 ends soon after.
STEEPEST = 1e30


class Draw:
    """One generation's part in the sampling: its terms, its seed and what it has generated so far.

    Attributes:
        position: how many tokens were taken.
        seed: the prompt's, or one drawn by chance where it has none.
        end_ids: the prompt's, in ascending order.
    """

    def __init__(self, prompt: Prompt, vocabulary: int) -> None:
        """Raises RequestError: a bias on a token that is not in the vocabulary."""
        sampling = prompt.sampling
        bad = next((token for token in sampling.logit_bias if not 0 <= token < vocabulary), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary (0 to {vocabulary - 1})", param="logit_bias")
        self.prompt = prompt
        self.position = 0
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.end_ids = np.array(sorted(i for i in prompt.end_ids if 0 <= i < vocabulary), np.intp)
        self._biased = np.array(list(sampling.logit_bias), np.intp)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        self._tally = _Tally.of(prompt)

    def take(self, token: int) -> None:
        """The token was chosen for this position; the next draw is for the one after it."""
        self.position += 1
        if self._tally is not None:
            self._tally.add(token)
        if self.prompt.constraint is not None:
            self.prompt.constraint.advance(token)

    @property
    def plain(self) -> bool:
        """Whether the logits are sampled as the model gave them."""
        return (
            self.prompt.constraint is None
            and self._tally is None
            and not len(self._biased)
            and self.position >= self.prompt.min_tokens
        )

    @property
    def uniform(self) -> float:
        """The number in [0, 1) that decides this position: 52 bits of BLAKE2b of (seed, choice, position)."""
        key = struct.pack("<3Q", self.seed % 2**64, self.prompt.choice, self.position)
        return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 12) * 2.0**-52

    def adjust(self, row: Floats) -> tuple[Floats, Indices | None] | Finish:
        """The logits that may be chosen from, after everything but temperature; the row itself may be changed.

        With a grammar only what it allows is left, and the ids come beside it. `Finish.STOP` where the grammar is
        complete, but it is too early for the end token.

        Raises:
            FettleError: the grammar cannot go on.
        """
        allowed = None if self.prompt.constraint is None else self.prompt.constraint.allowed()
        if self.position < self.prompt.min_tokens:
            row[self.end_ids] = -np.inf
        row[self._biased] += self._bias
        if self._tally is not None:
            self._tally.penalize(row, self.prompt)
        if allowed is None:
            return row, None
        ids = np.flatnonzero(allowed)
        values = row[ids]
        if not len(ids) or values.max() == -np.inf:
            if allowed[self.end_ids].any():
                return Finish.STOP
            raise EngineError("the grammar allows no token here that the model can give")
        return values, ids


class Sampler:
    """Not thread-safe: its buffers are for one step at a time."""

    def __init__(self, vocabulary: int) -> None:
        self._row = np.empty(vocabulary, np.float32)
        self._weights = np.empty(vocabulary, np.float32)

    def sample(self, logits: Floats, draws: Sequence[Draw]) -> list[Outcome]:
        """The next token of each generation; nothing is recorded before `Draw.take`.

        Args:
            logits: float32 [rows, vocabulary].
            draws: one for each row.

        Returns:
            For each row a token, an end, or the error that is this row's alone.
        """
        peaks = logits.argmax(axis=1)
        sound = np.isfinite(logits[np.arange(len(peaks)), peaks])
        return [
            self._next(logits[index], draw, peak) if good else EngineError("the model's output is not a number")
            for index, (draw, peak, good) in enumerate(zip(draws, peaks.tolist(), sound.tolist(), strict=True))
        ]

    def score(self, logits: Floats, following: NDArray[np.int32], top: int) -> list[Token]:
        """What the model gave to the tokens that did follow, with the `top` most likely ones; for `Step.prompt`.

        Args:
            logits: float32 [rows, vocabulary], at the positions before the tokens.
            following: int32 [rows].

        Raises:
            EngineError: some logits are not numbers.
        """
        if not np.isfinite(logits.max(axis=1)).all():
            raise EngineError("the model's output is not a number")
        return [self._told(row, token, top, None) for row, token in zip(logits, following.tolist(), strict=True)]

    def _next(self, row: Floats, draw: Draw, peak: int) -> Outcome:
        prompt = draw.prompt
        chosen = peak
        if not (draw.plain and prompt.sampling.greedy):
            try:
                outcome = self._choose(row, draw)
            except FettleError as error:
                return error
            if isinstance(outcome, Finish):
                return outcome
            chosen = outcome
        if prompt.sampling.logprobs is None and not prompt.want_end:
            return Token(chosen)
        return self._told(row, chosen, prompt.sampling.logprobs, draw)

    def _choose(self, row: Floats, draw: Draw) -> int | Finish:
        values, ids = row, None
        if not draw.plain:
            np.copyto(self._row, row)
            adjusted = draw.adjust(self._row)
            if isinstance(adjusted, Finish):
                return adjusted
            values, ids = adjusted
        peak = int(values.argmax())
        if not np.isfinite(values[peak]):
            raise EngineError("penalties and bias leave no token that could be drawn")
        index = peak if draw.prompt.sampling.greedy else self._sampled(values, draw, float(values[peak]))
        return index if ids is None else int(ids[index])

    def _sampled(self, values: Floats, draw: Draw, highest: float) -> int:
        sampling = draw.prompt.sampling
        kept: Indices | None = None
        # What min_p keeps depends on the ratio to the most likely token alone, so it may come after top_k.
        if 0 < sampling.top_k < len(values):
            kept = largest(values, sampling.top_k)
            values = values[kept]
        weights = self._exponentials(values, highest, min(1 / sampling.temperature, STEEPEST))
        if sampling.min_p > 0:
            likely = np.flatnonzero(weights >= sampling.min_p)
            kept, weights = likely if kept is None else kept[likely], weights[likely]
        if sampling.top_p < 1:
            inside = nucleus(weights, sampling.top_p)
            kept, weights = inside if kept is None else kept[inside], weights[inside]
        index = pick(weights, draw.uniform)
        return index if kept is None else int(kept[index])

    def _exponentials(self, values: Floats, highest: float, scale: float = 1.0) -> Floats:
        """`exp((values - highest) * scale)`, in the buffer that the next call overwrites; the largest is 1."""
        weights = self._weights[: len(values)]
        np.subtract(values, np.float32(highest), out=weights)
        if scale != 1.0:
            weights *= np.float32(scale)
        return np.exp(weights, out=weights)

    def _told(self, row: Floats, token: int, top: int | None, draw: Draw | None) -> Token:
        """The token with what was asked about it."""
        highest = float(row.max())
        total = highest + math.log(float(self._exponentials(row, highest).sum()))
        end = float("nan")
        if draw is not None and draw.prompt.want_end:
            end = float(np.exp(row[draw.end_ids].astype(np.float64) - total).sum())
        if top is None:
            return Token(token, end=end)
        best = largest(row, top) if top else np.empty(0, np.intp)
        best = best[np.argsort(-row[best], kind="stable")][:top]
        pairs = tuple((index, float(row[index]) - total) for index in best.tolist())
        return Token(token, float(row[token]) - total, pairs, end)


class _Tally:
    """Which tokens penalties are about, and how often each was generated: arrays that grow by doubling."""

    def __init__(self, ids: Indices) -> None:
        self._index = {token: index for index, token in enumerate(ids.tolist())}
        self._ids = ids
        self._counts = np.zeros(len(ids), np.float32)

    @classmethod
    def of(cls, prompt: Prompt) -> _Tally | None:
        """None where nothing is penalized. Repetition is also of the prompt's tokens, the others of generated ones."""
        sampling = prompt.sampling
        if sampling.repetition_penalty != 1:
            return cls(np.unique(prompt.ids).astype(np.intp))
        if sampling.presence_penalty or sampling.frequency_penalty:
            return cls(np.empty(0, np.intp))
        return None

    def add(self, token: int) -> None:
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(index + 64, np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(index + 64, np.float32)])
        self._ids[index] = token
        self._counts[index] += 1

    def penalize(self, row: Floats, prompt: Prompt) -> None:
        """As vLLM and OpenAI define it: repetition scales, frequency and presence subtract."""
        sampling = prompt.sampling
        ids, counts = self._ids[: len(self._index)], self._counts[: len(self._index)]
        values = row[ids]
        penalty = sampling.repetition_penalty
        if penalty != 1:
            values = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
        values -= np.float32(sampling.frequency_penalty) * counts
        values -= np.float32(sampling.presence_penalty) * (counts > 0)
        row[ids] = values


def largest(values: Floats, count: int) -> Indices:
    """Where the `count` largest values are, in ascending order of the index; also those that equal the last of them."""
    size = len(values)
    if count >= size:
        return np.arange(size)
    near: Indices | None = None
    # The maxima of disjoint groups are values too, so `count` of all values reach the maxima's own count-th largest.
    depth = size // max(4 * count, GROUPS)
    if depth > 1:
        maxima = values[: size // depth * depth].reshape(depth, -1).max(axis=0)
        near = np.flatnonzero(values >= np.partition(maxima, len(maxima) - count)[-count])
        values = values[near]
    reached = np.flatnonzero(values >= np.partition(values, len(values) - count)[-count])
    return reached if near is None else near[reached]


def nucleus(weights: Floats, share: float) -> Indices:
    """Where the fewest of the largest weights are that have at least this share of the sum; at least one.

    In ascending order of the index; of equal weights the first.
    """
    total = float(weights.sum())
    # Whatever is below this has less than 1 - share together, so it is outside.
    near = np.flatnonzero(weights >= (1 - share) * total / len(weights))
    inner = weights[near]
    cut, ties = _last_inside(inner, share * total)
    inside = np.flatnonzero(inner >= cut)
    equal = np.flatnonzero(inner[inside] == cut)
    if len(equal) > ties:
        inside = np.delete(inside, equal[ties:])
    return near[inside]


def _last_inside(weights: Floats, mass: float) -> tuple[np.float32, int]:
    """The smallest of the largest weights that together reach the mass, and how many just as large are needed."""
    above = 0.0
    while len(weights) > SORTED:
        # A sample's light end says between which weights the last one is; when it misleads, all is sorted.
        sample = np.sort(weights[:: len(weights) // SAMPLE])
        outside = above + float(weights.sum()) - mass
        lighter = np.cumsum(sample, dtype=np.float64) * (len(weights) / len(sample))
        place = int(np.searchsorted(lighter, outside))
        low = sample[place - MARGIN] if place >= MARGIN else np.float32(0)
        high = sample[place + MARGIN] if place + MARGIN < len(sample) else np.float32(np.inf)
        higher = weights > high
        gained = float(np.multiply(weights, higher).sum())
        between = weights[(weights >= low) & ~higher]
        left = mass - above - gained
        if not 0 < left <= float(between.sum()) or len(between) == len(weights):
            break
        above, weights = above + gained, between
    ranked = np.sort(weights)[::-1]
    reached = int(np.searchsorted(above + np.cumsum(ranked, dtype=np.float64), mass))
    last = min(reached, len(ranked) - 1)
    cut = ranked[last]
    return cut, last + 1 - int((ranked[:last] > cut).sum())


def pick(weights: Floats, uniform: float) -> int:
    """An index with a probability in proportion to its weight, by the inverse of the distribution at `uniform`."""
    start = 0
    if len(weights) > 2 * BLOCK:
        whole = len(weights) // BLOCK * BLOCK
        sums = weights[:whole].reshape(-1, BLOCK).sum(axis=1)
        if whole < len(weights):
            sums = np.append(sums, weights[whole:].sum())
        ends = np.cumsum(sums, dtype=np.float64)
        block = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
        before = float(ends[block - 1]) if block else 0.0
        uniform = (uniform * float(ends[-1]) - before) / float(sums[block])
        start = block * BLOCK
        weights = weights[start : start + BLOCK]
    ends = np.cumsum(weights, dtype=np.float64)
    # Rounding may lead to the very end; what is last there has a weight.
    return start + int(min(np.searchsorted(ends, uniform * ends[-1], side="right"), np.searchsorted(ends, ends[-1])))
