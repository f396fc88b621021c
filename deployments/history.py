"""The last three minutes, second by second: rates and quantiles out of routers' totals.

Totals come from each router once a second or so, at any moment of it. What a total grew by is spread evenly over the
time since the router's last report, so a report that is a little late makes no gap and no spike. A router that is seen
for the first time, or that began again at zero, adds what it counted since it started; one that is gone takes nothing
back. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.histogram import quantiles

SECONDS = 180
# What "now" means for rates and quantiles: long enough for a p99, short enough to follow a change.
RECENT_S = 10
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
# A router that reports later than this is not waited for.
LATE_S = 2.0
RATES = ("points", "classes", "places", "refused")

# A counter's place in its router's snapshot, below the family: ("points", "within-0.01") or ("times", "total", "77").
Path = tuple[str, ...]
Numbers = dict[Path, float]
# By title and by what they are of: ["pressure"]["1 %"].
Gauges = dict[str, dict[str, float]]
GAUGES = {
    "gears": ("classes", "name", "gear"),
    "pressure": ("classes", "name", "pressure"),
    "replicas": ("variants", "id", "replicas"),
    "queued": ("variants", "id", "queued"),
}


@dataclass(frozen=True, slots=True)
class Report:
    """The last that was heard of a router: when, by our clock and by its own, and its totals by family."""

    at: float
    own_at: float
    totals: Mapping[str, Numbers]


@dataclass(frozen=True, slots=True)
class Figures:
    """One family's second as it is shown: rates by counter, and quantiles of the second by part."""

    rates: Numbers
    times: Mapping[str, list[float]]


@dataclass(slots=True)
class Second:
    """What was counted in one second, by family, and the gauges at its end; `figures` as far as they were asked for."""

    counts: defaultdict[str, defaultdict[Path, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    gauges: Mapping[str, Gauges] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)


NOTHING = Figures({}, {})


class History:
    """Takes what `merged` gives and shows it as columns of numbers, one a second."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self._length = seconds
        self._seconds: dict[int, Second] = {}
        self._routers: dict[str, Report] = {}
        self._live: Mapping[str, Any] = {"routers": {}, "families": {}}
        self._at = 0.0
        self._begin: int | None = None

    def add(self, at: float, live: Mapping[str, Any]) -> None:
        """`live` is `merged(...)` at this moment, in Unix seconds; routers that it has as before add nothing."""
        if self._begin is None or at < self._at - LATE_S:
            # Also a clock that was set back: what was before has no place in the new time.
            self._begin = math.ceil(at)
            self._seconds.clear()
        self._at, self._live = at, live
        for name, snapshot in live["routers"].items():
            known = self._routers.get(name)
            if known is None or known.own_at != snapshot["at"]:
                totals = {family: dict(_flat(seen["counters"])) for family, seen in snapshot["families"].items()}
                self._count(at, snapshot["at"] - snapshot["started"], known, totals)
                self._routers[name] = Report(at, snapshot["at"], totals)
        self._second(int(at)).gauges = {name: _gauges(seen) for name, seen in live["families"].items()}
        self._forget()

    def view(self) -> dict[str, Any]:
        """What `GET /stats` shows as `live`; times in ms, rates a second, a series left out where it is all zero.

        The series have one number for each of the `seconds` full seconds that begin at `from`.
        """
        begin, end = self._span()
        return {
            "at": self._at,
            "routers": len(self._live["routers"]),
            "recent_s": RECENT_S,
            "from": begin,
            "seconds": end - begin,
            "families": [self._family(name, begin, end) for name in self._live["families"]],
        }

    def _count(self, at: float, age: float, known: Report | None, totals: Mapping[str, Numbers]) -> None:
        """Spread what the totals grew by over the time since the last report, or since the router's start."""
        before = {} if known is None else known.totals
        fell = any(numbers.get(path, 0) < old for name, numbers in totals.items() for path, old in _of(before, name))
        if known is None or fell:
            if age > LATE_S + RECENT_S:
                # An old router that we do not remember; when it counted all that is unknown.
                return
            before, begin = {}, at - age
        else:
            begin = known.at
        begin = min(max(begin, at - self._length), at)
        for second in range(int(begin), int(at) + 1):
            share = (min(at, second + 1) - max(begin, second)) / (at - begin) if at > begin else 1.0
            if share <= 0:
                continue
            place = self._second(second)
            counts = place.counts
            place.figures.clear()
            for name, numbers in totals.items():
                old, grown = before.get(name, {}), counts[name]
                for path, number in numbers.items():
                    if number != old.get(path, 0):
                        grown[path] += share * (number - old.get(path, 0))

    def _second(self, second: int) -> Second:
        return self._seconds.setdefault(second, Second())

    def _forget(self) -> None:
        # Some more than is shown: the first that is may have its gauges from before.
        oldest = int(self._at) - self._length - RECENT_S
        self._seconds = {at: second for at, second in self._seconds.items() if at >= oldest}
        self._routers = {
            name: report
            for name, report in self._routers.items()
            if name in self._live["routers"] or abs(self._at - report.at) <= self._length
        }

    def _span(self) -> tuple[int, int]:
        """The full seconds that every router has reported on, the late ones left aside."""
        if self._begin is None:
            return 0, 0
        heard = min((self._routers[name].at for name in self._live["routers"]), default=self._at)
        end = int(min(self._at, max(heard, self._at - LATE_S)))
        return min(max(self._begin, end - self._length), end), end

    def _family(self, name: str, begin: int, end: int) -> dict[str, Any]:
        seen = self._live["families"][name]
        counters = seen["counters"]
        return {
            **{key: value for key, value in seen.items() if key != "counters"},
            "totals": {"points": counters["points"], "refused": counters["refused"]},
            "now": self._now(name, begin, end),
            "history": _columns([self._figures_of(name, at) for at in range(begin, end)])
            | self._gauge_columns(name, begin, end),
        }

    def _now(self, name: str, begin: int, end: int) -> dict[str, Any]:
        """Over the last `RECENT_S`, or as long as there has been."""
        counts = self._recent(name, end - 1, begin)
        span = max(1, min(RECENT_S, end - begin))
        work: dict[str, dict[str, float]] = {}
        for variant in self._live["families"][name]["variants"]:
            rows, batches, busy = (counts[("work", variant["id"], key)] for key in ("rows", "batches", "busy_ms"))
            work[variant["id"]] = {
                "rows_s": short(rows / span),
                "batch_rows": short(rows / batches) if batches else 0,
                "busy": short(busy / 1000 / span / variant["replicas"]) if variant["replicas"] else 0,
            }
        times = _quantiles(counts, "times")
        requests = math.fsum(count for path, count in counts.items() if path[0] == "classes")
        return {
            **{kind: _tree(counts, kind, span) for kind in RATES},
            "times": {
                part: dict(zip(SHARES, found, strict=True)) | {"mean": short(counts[("sums", part)] / requests)}
                for part, found in times.items()
                if requests
            },
            "class_times": {
                quality: dict(zip(SHARES, found, strict=True))
                for quality, found in _quantiles(counts, "class_times").items()
            },
            "work": work,
        }

    def _gauge_columns(self, name: str, begin: int, end: int) -> dict[str, Any]:
        """A second without a report is as the one before it."""
        seen: Gauges = {}
        rows = []
        for at in range(begin - RECENT_S, end):
            second = self._seconds.get(at)
            if second is not None:
                seen = second.gauges.get(name, seen)
            rows.append(seen)
        columns: dict[str, Any] = {}
        for title, names in _gauges(self._live["families"][name]).items():
            series = {one: [row[title].get(one, 0) if row else 0 for row in rows[RECENT_S:]] for one in names}
            columns[title] = {one: column for one, column in series.items() if any(column)}
        return columns

    def _figures_of(self, name: str, at: int) -> Figures:
        second = self._seconds.get(at)
        if second is None:
            return NOTHING
        found = second.figures.get(name)
        if found is None:
            counts: Mapping[Path, float] = second.counts.get(name, {})
            rates = {path: short(count) for path, count in counts.items() if path[0] in RATES}
            found = second.figures[name] = Figures(rates, _quantiles(counts, "times"))
        return found

    def _recent(self, name: str, last: int, first: int) -> defaultdict[Path, float]:
        total: defaultdict[Path, float] = defaultdict(float)
        for at in range(max(first, last - RECENT_S + 1), last + 1):
            second = self._seconds.get(at)
            if second is not None:
                for path, count in second.counts.get(name, {}).items():
                    total[path] += count
        return total


def _columns(rows: Sequence[Figures]) -> dict[str, Any]:
    columns: dict[str, Any] = {kind: {} for kind in RATES}
    for path in dict.fromkeys(path for row in rows for path in row.rates):
        series = [row.rates.get(path, 0) for row in rows]
        if path[0] == "places":
            columns["places"].setdefault(path[1], {})[path[2]] = series
        else:
            columns[path[0]][path[1]] = series
    parts = dict.fromkeys(part for row in rows for part in row.times)
    columns["times"] = {
        part: {
            share: [row.times[part][place] if part in row.times else None for row in rows]
            for place, share in enumerate(SHARES)
        }
        for part in parts
    }
    return columns


def _gauges(family: Mapping[str, Any]) -> Gauges:
    return {
        title: {one[key]: round(one[value], 2) for one in family[kind]} for title, (kind, key, value) in GAUGES.items()
    }


def short(value: float) -> float:
    """Three digits, which is more than a screen shows, and short in JSON."""
    if isinstance(value, int) or not math.isfinite(value):
        return value if isinstance(value, int) else 0
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded.is_integer() else rounded


def _flat(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, float]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def _of(totals: Mapping[str, Numbers], name: str) -> Iterator[tuple[Path, float]]:
    yield from totals.get(name, {}).items()


def _tree(counts: Mapping[Path, float], kind: str, span: int) -> dict[str, Any]:
    """Rates of one kind; places by variant and stage."""
    tree: dict[str, Any] = {}
    for path, count in counts.items():
        if path[0] == kind:
            below = tree
            for name in path[1:-1]:
                below = below.setdefault(name, {})
            below[path[-1]] = short(count / span)
    return tree


def _quantiles(counts: Mapping[Path, float], kind: str) -> dict[str, list[float]]:
    bins: dict[str, dict[int, float]] = {}
    for path, count in counts.items():
        if path[0] == kind:
            bins.setdefault(path[1], {})[int(path[2])] = count
    found = {part: quantiles(numbers, list(SHARES.values())) for part, numbers in bins.items()}
    return {part: [short(value) for value in values] for part, values in found.items() if values is not None}
