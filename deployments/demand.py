"""What is wanted of each variant of a family, at one router: the work that comes, and who is missed and does not run.

Work is counted when a request comes, for its whole way: with the variants after the first as often as rows were seen to
go on to them. So a shortage of one variant does not hide what the others will be asked for, nor does a refusal. Counts
only; how many replicas that takes is `fettle.autoscale`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deployments.batcher import Batcher
from deployments.lane import Queued
from deployments.tickets import Terms
from fettle.menu import Way
from fettle.scheduling import NEVER, Priority

# What the certificate's rows did counts as so many, and what production does is forgotten from so many on.
PRIOR_ROWS = 100.0
MOST_ROWS = 10_000.0
# A variant that was asked for within this time still is.
ASKED_FOR_S = 5.0
WEIGHT = 0.3
# Of what an actor and its imports take beside loading the model, before any start was seen.
ACTOR_S = 5.0


@dataclass(slots=True)
class Wanted:
    """One variant: `work_s` of one replica and `rows` that came so far; when it was first and last missed."""

    work_s: float = 0.0
    rows: float = 0.0
    missed_since: float | None = None
    missed: float = float("-inf")
    start_s: float = ACTOR_S


@dataclass(slots=True)
class _Passed:
    """Of the rows that came to a step, how many went on."""

    came: float
    on: float


@dataclass(slots=True)
class Demand:
    """See the module. `starts`: seconds that loading each variant takes."""

    batchers: Mapping[str, Queued]
    starts: Mapping[str, float] = field(default_factory=dict)
    requests: int = 0
    _wanted: dict[str, Wanted] = field(init=False)
    _passed: dict[tuple[str, int], _Passed] = field(default_factory=dict)
    _mean: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._wanted = {name: Wanted(start_s=ACTOR_S + self.starts.get(name, 0.0)) for name in self.batchers}

    def comes(self, way: Way, lengths: Sequence[int]) -> None:
        """Rows of so many tokens will go this way."""
        work = []
        for stretch, reach in zip(way.stretches, self.reach(way), strict=True):
            batcher = self.batchers[stretch.step.variant]
            assert isinstance(batcher, Batcher)
            work.append(reach * stretch.share * sum(map(batcher.cost.row_ms, lengths)) / 1000)
            self._add(stretch.step.variant, work[-1], reach * len(lengths))
        self._note(way, work)

    def text_comes(self, way: Way, work_ms: Sequence[float]) -> None:
        """A call for text, which takes so much at each variant of the way that it reaches."""
        reached = self.reach(way)
        work = [reach * ms / 1000 for reach, ms in zip(reached, work_ms, strict=True)]
        for stretch, reach, seconds in zip(way.stretches, reached, work, strict=True):
            self._add(stretch.step.variant, seconds, reach)
        self._note(way, work)

    def turned_away(self, way: Way) -> None:
        """A request that was refused before its size was known: as large as others on this way.

        Where nothing waits it was refused for a deadline that more replicas would not keep either.
        """
        self.requests += 1
        if not any(self.batchers[variant].backlog_s > 0 for variant in way.variants):
            return
        for stretch, seconds in zip(way.stretches, self._mean.get(way.name, []), strict=False):
            self._add(stretch.step.variant, seconds, 1.0)

    def passed(self, way: Way, step: int, came: int, on: int) -> None:
        """So many rows came to this step, and so many of them went on to the next."""
        seen = self._seen(way, step)
        if seen.came > MOST_ROWS:
            seen.came, seen.on = seen.came / 2, seen.on / 2
        seen.came, seen.on = seen.came + came, seen.on + on

    def reach(self, way: Way) -> list[float]:
        """The share of the rows that gets to each step."""
        found, reach = [], 1.0
        for step in range(len(way.stretches)):
            found.append(reach)
            seen = self._seen(way, step)
            reach *= seen.on / seen.came
        return found

    # ---- Variants that do not run

    def order(self, ways: Sequence[Way], gear: int) -> list[int]:
        """Which ways to try: from the gear to the cheapest, those that run; if none does, dearer ones that do.

        The way of the gear is missed if it does not run, and comes back; it is waited for where nothing else runs.
        """
        gear = min(gear, len(ways) - 1)
        if len(ways) == 1 and self.runs(ways[0]):
            return [0]
        usual = list(range(gear, len(ways)))
        if not self.runs(ways[gear]):
            self.missing(ways[gear])
        running = [number for number in usual if self.runs(ways[number])]
        return running or [number for number in reversed(range(gear)) if self.runs(ways[number])] or usual

    def runs(self, way: Way) -> bool:
        """Whether each of its variants has a replica."""
        return all(self.batchers[variant].is_ready for variant in way.variants)

    def missing(self, way: Way) -> None:
        now = time.monotonic()
        for variant in way.variants:
            wanted = self._wanted[variant]
            if not self.batchers[variant].is_ready:
                wanted.missed = now
                wanted.missed_since = now if wanted.missed_since is None else wanted.missed_since

    def can_wait(self, way: Way, terms: Terms) -> bool:
        """Whether what does not run is expected to run before the deadline."""
        if terms.deadline == NEVER:
            return True
        return time.monotonic() + max(map(self.wait_s, way.variants)) < terms.deadline

    def wait_s(self, variant: str) -> float:
        """Until the variant has a replica, as far as earlier starts tell."""
        wanted = self._wanted[variant]
        if self.batchers[variant].is_ready:
            return 0.0
        waited = 0.0 if wanted.missed_since is None else time.monotonic() - wanted.missed_since
        return max(0.0, wanted.start_s - waited)

    def started(self, variant: str) -> None:
        """A variant that did not run has a replica now."""
        wanted = self._wanted[variant]
        if wanted.missed_since is not None:
            took = time.monotonic() - wanted.missed_since
            wanted.start_s += WEIGHT * (took - wanted.start_s)
            wanted.missed_since = None

    # ---- What is reported

    def figures(self, variant: str) -> dict[str, float]:
        """Counters and what is so now, of one variant."""
        wanted, batcher = self._wanted[variant], self.batchers[variant]
        missed = time.monotonic() - wanted.missed < ASKED_FOR_S
        # What the monitor asks in gaps is no reason for more, but one that is to be asked must be there.
        gaps = batcher.queue.work_ms(Priority.BATCH) + batcher.queue.work_ms(Priority.SHADOW)
        return {
            "work_s": wanted.work_s,
            "rows": wanted.rows,
            # In seconds of one replica, and only what waits: slow rows that are under way need nobody else.
            "backlog_s": batcher.queue.waiting_ms * batcher.speed.pace / 1000,
            "waiting": float(missed or gaps > 0 or batcher.depth > 0 or batcher.running > 0),
            "batches": float(batcher.stats.batches),
        }

    def _add(self, variant: str, seconds: float, rows: float) -> None:
        wanted = self._wanted[variant]
        # Corrected now: the pace of later must not change what has come.
        wanted.work_s += seconds * self.batchers[variant].speed.pace
        wanted.rows += rows

    def _seen(self, way: Way, step: int) -> _Passed:
        seen = self._passed.get((way.name, step))
        if seen is None:
            here = way.stretches[step].reach
            after = way.stretches[step + 1].reach if step + 1 < len(way.stretches) else 0.0
            seen = self._passed[way.name, step] = _Passed(PRIOR_ROWS, PRIOR_ROWS * (after / here if here > 0 else 0.0))
        return seen

    def _note(self, way: Way, work: Sequence[float]) -> None:
        self.requests += 1
        mean = self._mean.setdefault(way.name, list(work))
        for place, seconds in enumerate(work):
            mean[place] += WEIGHT * (seconds - mean[place])
