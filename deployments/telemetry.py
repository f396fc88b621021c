"""What a router counts: requests by operating point, class and place, refusals, and where the time went.

`Telemetry` is called for every request and does little more than add. Its `snapshot` is all that it has counted since
the process began, together with what the router is like now (`FamilyGauges`); `merged` adds up the snapshots of several
routers, and `deployments.history` makes rates of them. Knows neither Ray nor HTTP, and decides nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deployments.histogram import BINS, bin_of, sparse
from deployments.history import History as History
from fettle.quality import PointState

Refusal = Literal["overloaded", "limited", "late", "failed"]
# For a pressure or a backlog that has no end, because no replica is there.
ENDLESS = 1e9
PARTS = ("tokenize", "queue", "infer", "total")
# Numbers below names, as deep as it takes.
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ClassGauges:
    """A quality class now. `gears` are points, or variants where no point answers, from the most faithful on."""

    name: str
    max_disagreement: float
    gears: Sequence[str]
    gear: int
    pressure: float


@dataclass(frozen=True, slots=True)
class VariantGauges:
    """A variant now; `rows`, `batches` and `busy_ms` (of all replicas together) are totals since the start."""

    id: str
    stages: int
    replicas: int
    queued: int
    backlog_s: float
    rows: int
    batches: int
    busy_ms: float


@dataclass(frozen=True, slots=True)
class PointGauges:
    """An operating point; `steps` are the variants on its way, each with its number of stages."""

    id: str
    alpha: float
    upper_bound: float
    steps: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class FamilyGauges:
    """A family as its router sees it now; pressure above `shift_up` shifts a class, below `shift_down` back."""

    name: str
    task: str
    reference: str
    objective_ms: float
    classes: Sequence[ClassGauges]
    variants: Sequence[VariantGauges]
    points: Sequence[PointGauges]
    shift_up: float = 0.7
    shift_down: float = 0.3


@dataclass(slots=True)
class Times:
    """Bins, and the sum in ms."""

    bins: list[int] = field(default_factory=lambda: [0] * BINS)
    sum_ms: float = 0.0

    def add(self, ms: float) -> None:
        self.bins[bin_of(ms)] += 1
        self.sum_ms += ms


@dataclass(slots=True)
class Counts:
    """Of one family. `times` has bins and a sum of ms for each of `PARTS`; `class_times` of the total, by class.

    `ways` by class and point. Of text: `texts` by variant and why they ended, `given_up` by variant; `first_times` and
    `token_times` of streams, by variant.
    """

    ways: dict[tuple[str, str], int] = field(default_factory=dict)
    places: dict[tuple[str, int], int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    times: tuple[list[int], ...] = field(default_factory=lambda: tuple([0] * BINS for _ in PARTS))
    sums: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))
    class_times: dict[str, Times] = field(default_factory=dict)
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    texts: dict[tuple[str, str], int] = field(default_factory=dict)
    given_up: dict[str, int] = field(default_factory=dict)
    first_times: dict[str, Times] = field(default_factory=dict)
    token_times: dict[str, Times] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generated:
    """What a call for text came to.

    `finishes`: why each text of `variant` ended; `given_up`: of each text that was replaced, its variant.
    `first_ms` and `token_ms` of a stream: until its first token, and between two on average; None where unknown.
    """

    variant: str
    finishes: Sequence[str]
    output_tokens: int
    cached_tokens: int = 0
    given_up: Sequence[str] = ()
    first_ms: float | None = None
    token_ms: float | None = None


class Telemetry:
    """One router's counters. Its methods run on one thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._started = clock()
        self.families: dict[str, Counts] = {}

    def answered(
        self,
        family: str,
        quality: str,
        point: str,
        rows: Sequence[tuple[str, int]],
        *,
        tokenize_ms: float,
        queue_ms: float,
        infer_ms: float,
        total_ms: float,
        tokens: int = 0,
    ) -> None:
        """A request got its reply. `quality` names its class, `point` its operating point, else its variant.

        `rows`: the variant and the stage that answered each of them; `tokens` of them all.
        """
        counts = self.families.get(family) or self._counts(family)
        way = (quality, point)
        counts.ways[way] = counts.ways.get(way, 0) + 1
        counts.input_tokens += tokens
        places = counts.places
        for place in rows:
            places[place] = places.get(place, 0) + 1
        tokenize, queue, infer, total = counts.times
        tokenize[bin_of(tokenize_ms)] += 1
        queue[bin_of(queue_ms)] += 1
        infer[bin_of(infer_ms)] += 1
        whole = bin_of(total_ms)
        total[whole] += 1
        by_class = counts.class_times.get(quality)
        if by_class is None:
            by_class = counts.class_times[quality] = Times()
        by_class.bins[whole] += 1
        by_class.sum_ms += total_ms
        sums = counts.sums
        sums[0] += tokenize_ms
        sums[1] += queue_ms
        sums[2] += infer_ms
        sums[3] += total_ms

    def generated(self, family: str, made: Generated) -> None:
        """A call for text was answered in full; `answered` is told as well."""
        counts = self.families.get(family) or self._counts(family)
        counts.cached_tokens += made.cached_tokens
        counts.output_tokens += made.output_tokens
        for finish in made.finishes:
            end = (made.variant, finish)
            counts.texts[end] = counts.texts.get(end, 0) + 1
        for variant in made.given_up:
            counts.given_up[variant] = counts.given_up.get(variant, 0) + 1
        if made.first_ms is not None:
            counts.first_times.setdefault(made.variant, Times()).add(made.first_ms)
        if made.token_ms is not None:
            counts.token_times.setdefault(made.variant, Times()).add(made.token_ms)

    def refused(self, family: str, why: Refusal) -> None:
        """A request got an error: the queue was full, its key's limit was reached, it was too late, or it failed."""
        refused = (self.families.get(family) or self._counts(family)).refused
        refused[why] = refused.get(why, 0) + 1

    def snapshot(self, gauges: Sequence[FamilyGauges]) -> dict[str, Any]:
        """Everything since the start, and the gauges of now; plain values that JSON can hold."""
        return {
            "at": self._clock(),
            "started": self._started,
            "families": {family.name: self._family(family) for family in gauges},
        }

    def _counts(self, family: str) -> Counts:
        return self.families.setdefault(family, Counts())

    def _family(self, gauges: FamilyGauges) -> dict[str, Any]:
        counts = self.families.get(gauges.name) or Counts()
        places: Tree = {}
        for (variant, stage), rows in counts.places.items():
            places.setdefault(variant, {})[str(stage)] = rows
        points: dict[str, int] = {}
        classes: dict[str, int] = {}
        for (quality, point), requests in counts.ways.items():
            points[point] = points.get(point, 0) + requests
            classes[quality] = classes.get(quality, 0) + requests
        now = _finite(asdict(gauges), ENDLESS)
        work = ("rows", "batches", "busy_ms")
        return {
            **now,
            "variants": [
                {name: value for name, value in variant.items() if name not in work} for variant in now["variants"]
            ],
            "counters": {
                "points": points,
                "classes": classes,
                "places": places,
                "refused": dict(counts.refused),
                "times": {part: sparse(bins) for part, bins in zip(PARTS, counts.times, strict=True)},
                "sums": dict(zip(PARTS, counts.sums, strict=True)),
                "class_times": {name: sparse(times.bins) for name, times in counts.class_times.items()},
                "work": {variant["id"]: {name: variant[name] for name in work} for variant in now["variants"]},
            },
        }


def merged(snapshots: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All routers together: counters and queues added, gear and pressure the worst, replicas the most that one sees.

    `routers` keeps each by its name: totals of a sum would fall when a router goes, so rates are made of the parts.
    """
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for snapshot in snapshots.values():
        for name, family in snapshot["families"].items():
            parts.setdefault(name, []).append(family)
    return {
        "at": max((snapshot["at"] for snapshot in snapshots.values()), default=0.0),
        "routers": dict(snapshots),
        "families": {name: _merged_family(seen) for name, seen in parts.items()},
    }


def stats_body(
    live: Mapping[str, Any], states: Iterable[PointState], version: str, *, at: float, share: float | None = None
) -> dict[str, Any]:
    """The whole body of `GET /stats`. `live` is `History.view()`, `share` the part of the rows that is compared.

    Empty `live` means that the monitor has not answered yet; an old `live["at"]`, that it does not answer any more.
    """
    return {
        "at": at,
        "version": version,
        "routers": live.get("routers", 0),
        "shadow_share": share,
        "live": dict(live),
        "quality": [_finite(asdict(state), None) for state in states],
    }


def _merged_family(seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first router's view of what is served, and what only the others know of behind it."""
    classes: dict[str, dict[str, Any]] = {}
    variants: dict[str, dict[str, Any]] = {}
    points: dict[str, dict[str, Any]] = {}
    counters: Tree = {}
    for family in seen:
        for new in family["classes"]:
            old = classes.get(new["name"], new)
            worst = max(old, new, key=lambda one: (one["gear"], one["pressure"]))
            classes[new["name"]] = {**worst, "pressure": max(old["pressure"], new["pressure"])}
        for new in family["variants"]:
            old = variants.get(new["id"])
            variants[new["id"]] = dict(new) if old is None else _two_queues(old, new)
        for new in family["points"]:
            points.setdefault(new["id"], new)
        _add(counters, family["counters"])
    lists = {"classes": classes, "variants": variants, "points": points}
    return {**seen[0], **{name: list(found.values()) for name, found in lists.items()}, "counters": counters}


def _two_queues(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **old,
        "replicas": max(old["replicas"], new["replicas"]),
        "queued": old["queued"] + new["queued"],
        "backlog_s": old["backlog_s"] + new["backlog_s"],
    }


def _add(total: Tree, more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, Mapping):
            _add(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


def _finite(value: Any, instead: float | None) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(item, instead) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, instead) for item in value]
    return instead if isinstance(value, float) and not math.isfinite(value) else value
