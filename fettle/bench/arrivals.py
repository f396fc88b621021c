"""When requests come: arrival times whose rate changes over time, for one stream or several at once.

Pure functions of a seed, so that a live run and a simulation meet the same arrivals.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal

# (second, requests a second) in order of time: linear between two entries, nothing outside them.
Profile = tuple[tuple[float, float], ...]
Arrivals = Literal["constant", "poisson"]
FOREVER = 1e9


def steady(rate: float, seconds: float = FOREVER) -> Profile:
    """The same rate all the time."""
    return ((0.0, rate), (seconds, rate))


def scaled(profile: Profile, factor: float) -> Profile:
    return tuple((at, rate * factor) for at, rate in profile)


def rate_at(profile: Profile, second: float) -> float:
    """Requests a second at this time."""
    for (begin, first), (end, last) in itertools.pairwise(profile):
        if begin <= second < end:
            return first + (last - first) * (second - begin) / (end - begin)
    return 0.0


def times(profile: Profile, kind: Arrivals, seed: str) -> Iterator[float]:
    """Arrival times in seconds.

    The integral of the rate is spent in steps of one request: exponential ones for independent users (a Poisson
    process, by its time change), equal ones for "constant".
    """
    source = random.Random(seed)
    steps = iter(lambda: source.expovariate(1.0) if kind == "poisson" else 1.0, None)
    need = next(steps)
    for (begin, first), (end, last) in itertools.pairwise(profile):
        at, length = 0.0, end - begin
        slope = (last - first) / length if length > 0 else 0.0
        while length > 0:
            rate = first + slope * at
            left = (rate + last) / 2 * (length - at)
            if left <= need:
                need -= left
                break
            # rate x + slope x^2 / 2 = need, in the form that also holds for a slope of nearly nothing.
            at += 2 * need / (rate + math.sqrt(max(0.0, rate * rate + 2 * slope * need)))
            yield begin + at
            need = next(steps)


def merged(profiles: Sequence[Profile], kind: Arrivals, seed: int) -> Iterator[tuple[float, int]]:
    """Arrivals of several independent streams in order: (second, number of the stream)."""

    def one(number: int, profile: Profile) -> Iterator[tuple[float, int]]:
        return ((at, number) for at in times(profile, kind, f"{seed} {number}"))

    return heapq.merge(*itertools.starmap(one, enumerate(profiles)))
