"""Latencies by size: bins that grow by an eighth of an octave, so that a quantile is within 9 % at any scale.

Histograms of several processes or seconds are added bin by bin. Knows nothing of what was timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

LOWEST_MS = 0.01
PER_OCTAVE = 8
# The last but one ends above 100 s; the last has no end.
BINS = PER_OCTAVE * 24
HIGHEST_MS = LOWEST_MS * 2 ** ((BINS - 2) / PER_OCTAVE)
# Of these, every fourth edge from 0.64 ms to 84 s ends a bucket as Prometheus is shown it; `le`, in seconds.
_STEP = PER_OCTAVE // 2
_EDGES = tuple(range(6 * PER_OCTAVE, 23 * PER_OCTAVE + 1, _STEP))
BUCKETS_S = (*(f"{LOWEST_MS * 2 ** (edge / PER_OCTAVE) / 1000:.6g}" for edge in _EDGES), "+Inf")
# Sizes of batches, by powers of two.
SIZES = (*(str(2**power) for power in range(11)), "+Inf")


def bin_of(ms: float) -> int:
    """0 for all up to 0.01 ms, NaN included; the last for all from `HIGHEST_MS`."""
    if not ms > LOWEST_MS:
        return 0
    if ms >= HIGHEST_MS:
        return BINS - 1
    return int(math.log2(ms / LOWEST_MS) * PER_OCTAVE) + 1


def edges(number: int) -> tuple[float, float]:
    """Where a bin begins and ends, in ms; the last is drawn as wide as the one before it would be."""
    if number == 0:
        return 0.0, LOWEST_MS
    return LOWEST_MS * 2 ** ((number - 1) / PER_OCTAVE), LOWEST_MS * 2 ** (number / PER_OCTAVE)


def quantiles(counts: Mapping[int, float], shares: Sequence[float]) -> list[float] | None:
    """In ms, one for each share in ascending order, as if a bin's values lay evenly in it; None of nothing."""
    bins = sorted(number for number, count in counts.items() if count > 0)
    if not bins:
        return None
    total = math.fsum(counts[number] for number in bins)
    found: list[float] = []
    below, place = 0.0, 0
    for share in shares:
        wanted = share * total
        while place < len(bins) - 1 and below + counts[bins[place]] < wanted:
            below += counts[bins[place]]
            place += 1
        low, high = edges(bins[place])
        found.append(low + (high - low) * min(1.0, (wanted - below) / counts[bins[place]]))
    return found


def sparse(counts: Iterable[int]) -> dict[str, int]:
    """The bins that are not empty, by number; as text, since JSON has no other keys."""
    return {str(number): count for number, count in enumerate(counts) if count}


def buckets(bins: Sequence[int]) -> list[int]:
    """How many are in each of `BUCKETS_S`, from the number in each bin."""
    middle = [sum(bins[edge - _STEP + 1 : edge + 1]) for edge in _EDGES[1:]]
    return [sum(bins[: _EDGES[0] + 1]), *middle, sum(bins[_EDGES[-1] + 1 :])]


def size_of(rows: int) -> int:
    """The number of the bucket of `SIZES` that a batch of so many rows is in."""
    return min((rows - 1).bit_length(), len(SIZES) - 1)
