"""A fleet of variants in simulated time: rows come, wait, are answered in batches, and go on to the next variant.

A discrete-event simulation, deterministic. Replicas come and go as a `Scaler` says, and take their time to start.
Within one variant rows go first in, first out (`benchmarks.simulation` is about order); the routers are a fluid, whose
load is counted and which delay nothing. What scales is told what routers tell the product's policy, a second late.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fettle.autoscale import LONG_S, Count
from fettle.bench.arrivals import Profile, times
from fettle.scheduling import corrected_pace

TICK_S = 1.0
ROUTERS = "routers"


@dataclass(frozen=True, slots=True)
class Kind:
    """One variant: what a row costs on average, what a call costs beside, how much work fills a batch, in seconds."""

    name: str
    row_s: float
    start_s: float
    call_s: float = 0.0045
    batch_s: float = 0.05
    least: int = 1
    most: int = 1000


@dataclass(frozen=True, slots=True)
class Stream:
    """One quality class: its share of the requests, and its way: (variant, share of its rows that get there)."""

    share: float
    way: tuple[tuple[str, float], ...]


class Request(NamedTuple):
    """`length` times the mean of a row; `way`: (variant, share that gets there); `goes`: (variant, seconds) of it."""

    at: float
    length: float
    way: tuple[tuple[str, float], ...]
    goes: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """What happens. `router_s`: processor time of a router for one request."""

    kinds: Mapping[str, Kind]
    streams: Sequence[Stream]
    profile: Profile
    objective_s: float
    max_queue_s: float = 2.0
    router_s: float = 0.002
    seed: int = 0

    @property
    def seconds(self) -> int:
        return math.ceil(self.profile[-1][0])

    def requests(self) -> Iterator[Request]:
        """In order of arrival."""
        chance = random.Random(f"ways {self.seed}")
        shares = list(itertools.accumulate(stream.share for stream in self.streams))
        for at in times(self.profile, "poisson", f"requests {self.seed}"):
            drawn = chance.random() * shares[-1]
            stream = self.streams[next(n for n, share in enumerate(shares) if drawn < share)]
            depth = chance.random()
            # Rows differ in length: uniform between half and one and a half of the mean.
            length = 0.5 + chance.random()
            goes = tuple((name, length * self.kinds[name].row_s) for name, reach in stream.way if depth < reach)
            yield Request(at, length, stream.way, goes)


@dataclass(frozen=True, slots=True)
class View:
    """One deployment as a scaler sees it. `counts` of the last seconds; `calls` under way or waiting at replicas."""

    name: str
    running: int
    wanted: int
    least: int
    most: int
    counts: Sequence[Count]
    backlog_s: float
    waiting: bool
    requests: float
    calls: float


class Scaler(Protocol):
    def decide(self, now: float, views: Sequence[View]) -> Mapping[str, int]:
        """How many of each there should be; who is not named stays. Called every TICK_S."""
        ...


@dataclass(slots=True)
class Trace:
    """By second: requests that came, were answered within the objective, late, refused; replicas and work by name."""

    came: list[int]
    good: list[int]
    late: list[int]
    refused: list[int]
    wanted: dict[str, list[int]]
    running: dict[str, list[int]]
    work: dict[str, list[float]]
    replica_s: dict[str, float]


@dataclass(slots=True, eq=False)
class _Start:
    cancelled: bool = False


_Row = tuple[float, tuple[tuple[str, float], ...], int]  # arrived, way, step


@dataclass(slots=True, eq=False)
class _Pool:
    kind: Kind
    wanted: int
    running: int
    busy: int = 0
    leaving: int = 0
    queue: deque[_Row] = field(default_factory=deque)
    starting: list[_Start] = field(default_factory=list)
    queued_s: float = 0.0
    under_way_s: float = 0.0
    came_s: float = 0.0
    paced_s: float = 0.0
    rows: float = 0.0
    pace: float = 1.0
    replica_s: float = 0.0
    counts: deque[Count] = field(default_factory=deque)

    @property
    def free(self) -> int:
        """Replicas without a batch; those that leave finish theirs and take no other."""
        return self.running - (self.busy - self.leaving)

    @property
    def existing(self) -> int:
        return self.running + len(self.starting) + self.leaving

    @property
    def backlog_s(self) -> float:
        return (self.queued_s + self.under_way_s) * self.pace

    def comes(self, work_s: float, rows: float = 1.0) -> None:
        self.came_s += work_s
        self.paced_s += work_s * self.pace
        self.rows += rows

    def take(self) -> list[_Row]:
        """A batch: whatever waits, up to what fills one."""
        batch: list[_Row] = []
        work = 0.0
        while self.queue:
            row = self.queue[0]
            cost = row[1][row[2]][1]
            if batch and work + cost > self.kind.batch_s:
                break
            work += cost
            batch.append(self.queue.popleft())
        self.queued_s = max(0.0, self.queued_s - work) if self.queue else 0.0
        self.under_way_s += work
        self.busy += 1
        return batch


class Fleet:
    """See the module."""

    def __init__(self, scene: Scene, scaler: Scaler, begin: Mapping[str, int]) -> None:
        self._scene, self._scaler = scene, scaler
        self._pools = {name: _Pool(kind, begin[name], begin[name]) for name, kind in scene.kinds.items()}
        routers = Kind(ROUTERS, scene.router_s, start_s=max(kind.start_s for kind in scene.kinds.values()))
        self._routers = _Pool(routers, begin.get(ROUTERS, 1), begin.get(ROUTERS, 1))
        self._events: list[tuple[float, int, _Pool, list[_Row] | _Start, float]] = []
        self._order = itertools.count()
        empty = [0] * scene.seconds
        names = [*self._pools, ROUTERS]
        self.trace = Trace(
            [*empty], [*empty], [*empty], [*empty],
            {name: [] for name in names}, {name: [] for name in names}, {name: [] for name in names}, {},
        )  # fmt: skip

    def run(self) -> Trace:
        """Until the last request was answered."""
        pending: list[View] = []
        requests = self._scene.requests()
        upcoming = next(requests, None)
        for tick in range(self._scene.seconds):
            now = tick * TICK_S
            self._apply(now, self._scaler.decide(now, pending) if pending else {})
            pending = [self._view(pool, now) for pool in self._all]
            for pool in self._all:
                name = pool.kind.name
                self.trace.wanted[name].append(pool.wanted)
                self.trace.running[name].append(pool.running)
                self.trace.work[name].append(pool.came_s)
                pool.replica_s += pool.existing * TICK_S
            while upcoming is not None and upcoming.at < now + TICK_S:
                self._until(upcoming.at)
                self._enter(upcoming)
                upcoming = next(requests, None)
            self._until(now + TICK_S)
        self._until(math.inf)
        for pool in self._all:
            self.trace.replica_s[pool.kind.name] = pool.replica_s
        return self.trace

    @property
    def _all(self) -> list[_Pool]:
        return [*self._pools.values(), self._routers]

    def _view(self, pool: _Pool, now: float) -> View:
        pool.counts.append(Count(now, pool.paced_s, pool.rows))
        while pool.counts[0].at < now - LONG_S - 2:
            pool.counts.popleft()
        kind = pool.kind
        per_batch = max(1.0, kind.batch_s / kind.row_s)
        # One more batch waits at each busy replica, as far as rows wait.
        calls = pool.busy + min(pool.busy, math.ceil(len(pool.queue) / per_batch))
        requests = len(pool.queue) + (pool.under_way_s / kind.row_s if kind.row_s else 0)
        return View(
            kind.name, pool.running, pool.wanted, kind.least, kind.most, tuple(pool.counts),
            pool.queued_s * pool.pace, bool(pool.queue or pool.busy), requests, calls,
        )  # fmt: skip

    def _enter(self, request: Request) -> None:
        now, second = request.at, int(request.at)
        self.trace.came[second] += 1
        self._routers.comes(self._scene.router_s)
        # As the router does it: the whole way is expected when a request comes, whether it is let in or not.
        for name, reach in request.way:
            reached = self._pools[name]
            reached.comes(reach * request.length * reached.kind.row_s, reach)
        pool = self._pools[request.goes[0][0]]
        if pool.backlog_s > self._scene.max_queue_s * max(1, pool.running):
            self.trace.refused[second] += 1
            return
        self._push((now, request.goes, 0), pool, now)

    def _push(self, row: _Row, pool: _Pool, now: float) -> None:
        pool.queue.append(row)
        pool.queued_s += row[1][row[2]][1]
        if pool.free > 0:
            self._start_batch(pool, now)

    def _start_batch(self, pool: _Pool, now: float) -> None:
        batch = pool.take()
        work = sum(way[step][1] for _, way, step in batch)
        heapq.heappush(self._events, (now + work + pool.kind.call_s, next(self._order), pool, batch, work))

    def _until(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, _, pool, what, work = heapq.heappop(self._events)
            if isinstance(what, _Start):
                if not what.cancelled:
                    pool.starting.remove(what)
                    pool.running += 1
                    if pool.queue:
                        self._start_batch(pool, at)
            else:
                self._done(pool, what, work, at)

    def _done(self, pool: _Pool, batch: list[_Row], work: float, now: float) -> None:
        pool.busy -= 1
        pool.under_way_s = max(0.0, pool.under_way_s - work)
        # As the router does it: what a call takes counts where there was work all the time.
        pool.pace = corrected_pace(pool.pace, work, work + (pool.kind.call_s if pool.queue else 0.0))
        for row in batch:
            arrived, way, step = row
            if step + 1 < len(way):
                self._push((arrived, way, step + 1), self._pools[way[step + 1][0]], now)
            elif now - arrived <= self._scene.objective_s:
                self.trace.good[int(arrived)] += 1
            else:
                self.trace.late[int(arrived)] += 1
        if pool.leaving:
            pool.leaving -= 1
        elif pool.queue and pool.free > 0:
            self._start_batch(pool, now)

    def _apply(self, now: float, wanted: Mapping[str, int]) -> None:
        for pool in self._all:
            count = min(max(wanted.get(pool.kind.name, pool.wanted), pool.kind.least), pool.kind.most)
            for _ in range(count - pool.wanted):
                start = _Start()
                pool.starting.append(start)
                heapq.heappush(self._events, (now + pool.kind.start_s, next(self._order), pool, start, 0.0))
            for _ in range(pool.wanted - count):
                self._stop_one(pool)
            pool.wanted = count

    def _stop_one(self, pool: _Pool) -> None:
        """One that starts, else one that has nothing to do, else one after its batch."""
        if pool.starting:
            pool.starting.pop().cancelled = True
            return
        pool.running -= 1
        if pool.free < 0 and pool is not self._routers:
            pool.leaving += 1
