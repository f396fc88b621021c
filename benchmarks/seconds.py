"""What a load looked like over time: one column a figure, one entry a second, for each flow."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fettle.bench.samples import Samples, Words, quantiles

LIKELY = 0.99  # of the requests in a window must be answered, or the flow was not served there


@dataclass(frozen=True, slots=True)
class Seconds:
    """One flow by the second in which its requests were due; None where there were none.

    `gear` and `point` are what most replies say.
    """

    tag: str
    offered: list[int]
    answered: list[int]
    refused: list[int]
    p50_ms: list[float | None]
    p99_ms: list[float | None]
    gear: list[int | None]
    point: list[str | None]


def by_second(samples: Samples, tag: str, seconds: int) -> Seconds:
    """The samples must have the headers x-fettle-gear and x-fettle-point."""
    mine = samples.where(samples.of(tag))
    found: dict[str, list[Any]] = {name: [] for name in Seconds.__slots__ if name != "tag"}
    at = np.floor(mine.due).astype(int)
    for second in range(seconds):
        here = mine.where(at == second)
        good = here.where(here.good)
        latency = quantiles(good.ms)
        gear = most_common(good.headers["x-fettle-gear"])
        found["offered"].append(len(here))
        found["answered"].append(len(good))
        found["refused"].append(int((here.status == 429).sum()))
        found["p50_ms"].append(latency["p50_ms"])
        found["p99_ms"].append(latency["p99_ms"])
        found["gear"].append(int(gear) if gear and gear.isdigit() else None)
        found["point"].append(most_common(good.headers["x-fettle-point"]))
    return Seconds(tag, **found)


def most_common(words: Words) -> str | None:
    """The word that comes most often; None where there is none."""
    counted = Counter(word for word in words.tolist() if word)
    return counted.most_common(1)[0][0] if counted else None


@dataclass(frozen=True, slots=True)
class Shifts:
    """Changes of a gear over time: all of them, and how often their direction turned."""

    changes: int
    turns: int


def shifts(gears: Sequence[int | None]) -> Shifts:
    """Of the gears by second; seconds without one are passed over."""
    known = [gear for gear in gears if gear is not None]
    steps = [after - before for before, after in itertools.pairwise(known) if after != before]
    turns = sum((a > 0) != (b > 0) for a, b in itertools.pairwise(steps))
    return Shifts(len(steps), turns)


def held_until(samples: Samples, tag: str, objective_ms: float, end: float, window: float = 4.0) -> float | None:
    """The second up to which, from the beginning, p99 kept the objective and nothing was turned away.

    Two windows in a row have to fail, so that one pause of a shared machine does not count. None: it never failed
    before `end`.
    """
    mine = samples.where(samples.of(tag))
    failed_before = False
    for start in np.arange(0.0, end - window / 2, window):
        here = mine.where((mine.due >= start) & (mine.due < start + window))
        if not len(here):
            continue
        p99 = quantiles(here.ms[here.good])["p99_ms"]
        failed = p99 is None or p99 > objective_ms or here.good.mean() < LIKELY
        if failed and failed_before:
            return float(start - window)
        failed_before = failed
    return None
