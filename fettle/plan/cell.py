"""Routers with their replicas in simulated time: requests go in, and come out after as long as they would take.

A discrete-event simulation that makes the router's decisions with the router's code: queues, gears, menu, predicted
costs. What things really take is the latency tables' time and `ServingCosts`, on processors that are shared or not.
Deterministic: the same arrivals and seed give the same answers.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fettle.config import ReplicaConfig, ServeConfig
from fettle.costs import CALL_MS, RowCosts, batch_tokens, niceness, work_shares
from fettle.family import Family
from fettle.gearbox import EVERY_S, Gearbox
from fettle.menu import Menu, Way
from fettle.plan.cores import Cores, Done, Process
from fettle.plan.engine_time import batch_seconds, table_of
from fettle.plan.station import Row, Station
from fettle.plan.workload import Arriving, Asked, Visit, Ways, chances
from fettle.scheduling import BatchBounds

# How often Ray's own processes have something to do: Serve's control loop, and about as often the agents.
BURST_EVERY_S = 0.5


def nobody(_: float) -> None:
    """Is told of what nobody waits for."""


@dataclass(frozen=True, slots=True)
class ServingCosts:
    """Processor ms of the serving path, beside the engines' own time.

    `benchmarks.plan_check` measures them on a machine. The defaults lie between the two such calibrations of one run on
    two cores of an AMD EPYC (Zen 5).

    `proxy`: HAProxy, a request; `intake`: the router until a request is queued; `reply`: from an answer until it is
    sent; `batch`: the router, a batch, both ways; `replica`: a replica, a batch, beside its engine; `beside`: Ray's
    other processes, a request. `wire` is no work but time: one way between router and replica. `background`: cores that
    Ray takes for itself on each node, always, in bursts.
    """

    proxy: float = 0.13
    intake: float = 0.46
    reply: float = 0.31
    batch: float = 1.4
    replica: float = 1.5
    beside: float = 0.08
    wire: float = 0.23
    background: float = 0.17

    @property
    def request_ms(self) -> float:
        """Of the router's one core, by a request that has a batch to itself."""
        return self.intake + self.reply + self.batch

    def at_pace(self, pace: float) -> ServingCosts:
        """On a machine that takes `pace` times as long for everything."""
        work = {name: pace * getattr(self, name) for name in ("proxy", "intake", "reply", "batch", "replica", "beside")}
        return replace(self, **work)


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. `replicas` by variant; `cores` None: every process has its own.

    `paces` by variant: what an engine takes on this machine, as it runs here, over its latency table's time.
    `client_ms`: a request, of a client on the same cores. `cheapest`: classes stay in their last gear. `routers` are
    processes that take requests in turn, with one queue before each variant between them.
    """

    family: Family
    asked: Sequence[Asked]
    replicas: Mapping[str, int]
    lengths: Sequence[int]
    config: ServeConfig
    costs: ServingCosts = ServingCosts()
    cores: float | None = None
    paces: Mapping[str, float] = field(default_factory=dict)
    client_ms: float = 0.0
    cheapest: bool = False
    routers: int = 1


@dataclass(frozen=True, slots=True)
class Simulated:
    """Of the requests that came in the window, one entry each, in order; `ms` is NaN for those that were refused.

    `busy` by process: the share of the window in which it had work, in cores.
    """

    came: NDArray[np.float64]
    ms: NDArray[np.float64]
    asked: NDArray[np.int16]
    point: NDArray[np.int16]
    points: list[str]
    busy: dict[str, float]
    rows_a_batch: dict[str, float]

    def of(self, number: int) -> NDArray[np.float64]:
        """Latencies of one class, refused ones left out."""
        chosen: NDArray[np.float64] = self.ms[(self.asked == number) & ~np.isnan(self.ms)]
        return chosen

    @property
    def refused(self) -> float:
        return float(np.isnan(self.ms).mean()) if len(self.ms) else 0.0


@dataclass(slots=True, eq=False)
class _Request:
    came: float
    asked: int
    text: int
    length: int
    chance: float
    way: Way | None = None
    step: int = 0
    visits: tuple[Visit, ...] = ()
    ended: float = float("nan")


class Cell:
    """See the module."""

    def __init__(self, setup: Setup, seed: int = 0) -> None:
        self._setup = setup
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._cores = Cores(float("inf") if setup.cores is None else setup.cores)
        self._chances = chances(seed)
        self._routers = [Process(self._cores) for _ in range(setup.routers)]
        self._ray = Process(self._cores)
        self._proxy, self._client = Process(self._cores, threads=setup.routers), Process(self._cores)
        self._menu = Menu(setup.family, setup.replicas)
        self._ways = Ways(setup.family)
        shares = work_shares(setup.family, setup.replicas)
        self._tokens = {name: self._batch_tokens(name, shares[name]) for name in setup.replicas}
        self._stations = {name: self._station(name, count) for name, count in setup.replicas.items()}
        self._engines = {name: self._processes(name, count) for name, count in setup.replicas.items()}
        self._costs = {name: self._row_costs(name) for name in setup.replicas}
        self._times = {
            name: batch_seconds(setup.family, name, setup.config.replicas, setup.paces.get(name, 1.0))
            for name in setup.replicas
        }
        self._gearbox = Gearbox(self._menu, self._stations, setup.config.gears)
        self._requests: list[_Request] = []

    def run(self, coming: Arriving, seconds: float, warm_up: float = 0.0) -> Simulated:
        """Everything that comes within `warm_up` and `seconds`, to its end."""
        end = warm_up + seconds
        tick = 0.0
        self._later(0.0, lambda now: self._burst(now, end))
        nothing = (float("inf"), 0, 0)
        following = next(coming, nothing)
        busy: dict[str, float] | None = None
        while True:
            now = min(
                following[0] if following[0] < end else float("inf"),
                self._cores.next_at,
                self._events[0][0] if self._events else float("inf"),
            )
            if now == float("inf"):
                break
            if busy is None and now >= warm_up:
                busy = self._busy()
            while tick <= now and tick < end + EVERY_S:
                self._gearbox.tick(tick)
                tick += EVERY_S
            if self._events and self._events[0][0] <= now:
                heapq.heappop(self._events)[2](now)
            elif self._cores.next_at <= now:
                self._cores.finish()
            else:
                at, asked, text = following
                following = next(coming, nothing)
                length = self._setup.lengths[text % len(self._setup.lengths)]
                self._come(_Request(at, asked, text, length, self._chances.random()), at)
        return self._summary(warm_up, seconds, busy or {})

    def _burst(self, now: float, end: float) -> None:
        """Ray's own work, now and again until the end."""
        self._beside(self._setup.costs.background * BURST_EVERY_S, now)
        if now + BURST_EVERY_S < end:
            self._later(now + BURST_EVERY_S, lambda then: self._burst(then, end))

    def _beside(self, seconds: float, now: float) -> None:
        """Work of Ray's, which only who shares its cores feels."""
        if self._setup.cores is not None:
            self._ray.add(seconds, nobody, now)

    # What happens to a request, in order

    def _come(self, request: _Request, now: float) -> None:
        self._requests.append(request)
        costs = self._setup.costs

        self._beside(costs.beside / 1000, now)

        def at_router(at: float) -> None:
            self._at_router(costs.intake, lambda done: self._admit(request, done), at)

        def at_proxy(at: float) -> None:
            self._proxy.add(costs.proxy / 2000, at_router, at)

        if self._setup.client_ms:
            self._client.add(self._setup.client_ms / 2000, at_proxy, now)
        else:
            at_proxy(now)

    def _admit(self, request: _Request, now: float) -> None:
        way = self._choose(self._setup.asked[request.asked])
        if way is None:
            return
        request.way = way
        request.visits = self._ways.draw(way, request.chance)
        self._queue(request, now)

    def _choose(self, asked: Asked) -> Way | None:
        """As `deployments.router` does: the gear's way, or a cheaper one where that has no room."""
        gear, ways = 0, asked.ways(self._menu)
        if asked.variant is None:
            gear = min(self._gearbox.number(asked.tolerance, degraded=False), len(ways) - 1)
        if self._setup.cheapest:
            gear = len(ways) - 1
        for way in ways[gear:]:
            if all(self._stations[variant].has_room() for variant in way.variants):
                return way
        return None

    def _queue(self, request: _Request, now: float) -> None:
        assert request.way is not None
        visit, stretch = request.visits[request.step], request.way.stretches[request.step]
        station = self._stations[visit.variant]
        cost = self._costs[visit.variant].row_ms(request.length) * stretch.share
        row = Row(
            request.length,
            cost,
            request.came,
            request.came + station.max_queue_s,
            parts=visit.parts,
            request=request,
        )
        station.push(row, now)

    def _depart(self, station: Station, batch: list[Row], now: float) -> None:
        """One call: the router's part, the way, the engine, the way back, the router's part again, the rows."""
        costs = self._setup.costs
        name = next(variant for variant, each in self._stations.items() if each is station)
        # Ray's handle counts what it has sent to each, and prefers who has less.
        replica = min(self._engines[name], key=lambda process: process.claims)
        replica.claims += 1

        def to_replica(at: float) -> None:
            self._later(at + costs.wire / 1000, at_replica)

        def at_replica(at: float) -> None:
            taken = self._times[name]([(row.length, row.parts) for row in batch])
            replica.add(taken + costs.replica / 1000, from_replica, at)

        def from_replica(at: float) -> None:
            self._later(at + costs.wire / 1000, lambda then: self._at_router(costs.batch / 2, back, then))

        def back(at: float) -> None:
            replica.claims -= 1
            station.landed(batch, now, at)
            for row in batch:
                assert isinstance(row.request, _Request)
                self._answered(row.request, at)

        self._at_router(costs.batch / 2, to_replica, now)

    def _answered(self, request: _Request, now: float) -> None:
        if request.step < len(request.visits) - 1:
            request.step += 1
            self._queue(request, now)
            return
        costs = self._setup.costs

        def ended(at: float) -> None:
            request.ended = at

        def at_client(at: float) -> None:
            if self._setup.client_ms:
                self._client.add(self._setup.client_ms / 2000, ended, at)
            else:
                ended(at)

        def at_proxy(at: float) -> None:
            self._proxy.add(costs.proxy / 2000, at_client, at)

        self._at_router(costs.reply, at_proxy, now)

    def _at_router(self, ms: float, done: Done, now: float) -> None:
        """By the router that has least to do, since any may have the request."""
        min(self._routers, key=lambda router: router.jobs).add(ms / 1000, done, now)

    # What it is made of

    def _later(self, at: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), what))

    def _station(self, name: str, replicas: int) -> Station:
        config = self._setup.config
        bounds = BatchBounds(config.batch.max_rows, self._tokens[name], config.batch.max_age_ms / 1000)
        places = config.replicas.places
        return Station(bounds, replicas, places, CALL_MS / 1000, config.batch.max_queue_s, self._later, self._depart)

    def _batch_tokens(self, name: str, work_share: float) -> int:
        config = self._setup.config
        return config.batch.max_tokens or batch_tokens(
            table_of(self._setup.family, name), config.gears.objective_ms, work_share
        )

    def _processes(self, name: str, replicas: int) -> list[Process]:
        config: ReplicaConfig = self._setup.config.replicas
        nice = niceness(self._setup.family, name, config)
        return [Process(self._cores, nice, config.threads) for _ in range(replicas)]

    def _row_costs(self, name: str) -> RowCosts:
        family = self._setup.family
        return RowCosts(table_of(family, name), self._tokens[name], family.variant(name).tokenizer.max_length)

    def _busy(self) -> dict[str, float]:
        found = {
            "router": sum(each.busy_s for each in self._routers),
            "proxy": self._proxy.busy_s,
            "client": self._client.busy_s,
        }
        return found | {name: sum(each.busy_s for each in engines) for name, engines in self._engines.items()}

    def _summary(self, warm_up: float, seconds: float, before: Mapping[str, float]) -> Simulated:
        chosen = [request for request in self._requests if request.came >= warm_up]
        ways = [request.way.name if request.way else "" for request in chosen]
        points = sorted(set(ways))
        places = {name: number for number, name in enumerate(points)}
        return Simulated(
            came=np.array([request.came - warm_up for request in chosen]),
            ms=np.array([1000 * (request.ended - request.came) for request in chosen]),
            asked=np.array([request.asked for request in chosen], np.int16),
            point=np.array([places[way] for way in ways], np.int16),
            points=points,
            busy={name: (spent - before.get(name, 0.0)) / seconds for name, spent in self._busy().items()},
            rows_a_batch={name: each.rows / max(1, each.batches) for name, each in self._stations.items()},
        )
