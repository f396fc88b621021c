"""The fewest replicas that bear a load within an objective, and what they take.

A large service is cells of a few routers with replicas of their own that are all alike: one is simulated, and counted
as often as the load needs, so that millions of requests a second cost no more than thousands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fettle.errors import UsageError
from fettle.menu import Menu
from fettle.plan.cell import Cell, Setup, Simulated
from fettle.plan.engine_time import table_of
from fettle.plan.workload import Asked, Ways, arrivals

# In a cell: enough for whole replicas to be little of it.
MOST_ROUTERS = 4
# Of a router's one core: beyond it, waiting for the router alone takes the objective.
ROUTER_LOAD = 0.7
# How busy replicas may be on average, in engine seconds of full batches: from the least to the most that is tried.
LEAST_LOAD, MOST_LOAD, CLOSE = 0.05, 0.95, 0.04
# Until queues and gears are as they stay.
WARM_UP_S, FAST_RPS = 4.0, 1000.0
# Requests that a simulation is about, for its p99 to mean something, and the seconds that they may take.
REQUESTS = 8000
SHORTEST_S, LONGEST_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Objective:
    """So many milliseconds at this percentile, for each class, with almost nothing refused."""

    latency_ms: float
    percentile: float = 99.0
    refused: float = 0.001

    def kept(self, found: Simulated, classes: int) -> bool:
        return found.refused <= self.refused and all(
            percentile(found.of(number), self.percentile) <= self.latency_ms for number in range(classes)
        )


@dataclass(frozen=True, slots=True)
class Size:
    """`cells` of so many `routers` and `replicas` each, at `rate` a cell; `found` is how one of them does."""

    cells: int
    routers: int
    rate: float
    replicas: dict[str, int]
    found: Simulated
    kept: bool


def percentile(ms: np.ndarray, rank: float) -> float:
    """Of the nearest rank; 0 where there is nothing."""
    if not len(ms):
        return 0.0
    return float(np.sort(ms)[max(0, math.ceil(rank / 100 * len(ms)) - 1)])


def simulate(setup: Setup, rate: float, seed: int = 0, requests: int = REQUESTS) -> Simulated:
    """A cell at a steady rate, for as long as its percentiles take."""
    seconds = min(max(requests / rate, SHORTEST_S), LONGEST_S)
    coming = arrivals(setup.asked, rate, len(setup.lengths), seed)
    return Cell(setup, seed).run(coming, seconds, WARM_UP_S if rate < FAST_RPS else WARM_UP_S / 2)


def capacity(setup: Setup, objective: Objective, most: float = 1e4, seed: int = 0, requests: int = REQUESTS) -> float:
    """The highest steady rate, within 2 %, at which a cell of this setup keeps the objective; 0 if it never does."""
    classes = len(setup.asked)
    low, high = 0.0, 4.0
    while high < most and objective.kept(simulate(setup, high, seed, requests), classes):
        low, high = high, 2 * high
    while high - low > 0.02 * high and high > 0.5:
        middle = (low + high) / 2
        if objective.kept(simulate(setup, middle, seed, requests), classes):
            low = middle
        else:
            high = middle
    return low


def size(setup: Setup, rate: float, objective: Objective, seed: int = 0, requests: int = REQUESTS) -> Size:
    """Cells and replicas for this rate, each process on cores of its own.

    All variants have as many for what they have to do; as few as keep the objective. `kept` False: not even many are
    enough, since one request alone takes too long.
    """
    total = max(1, math.ceil(rate * setup.costs.request_ms / 1000 / ROUTER_LOAD))
    cells = math.ceil(total / MOST_ROUTERS)
    routers = math.ceil(total / cells)
    each = rate / cells
    needs = demand(setup, each)

    def at(load: float) -> Size:
        replicas = {name: max(1, math.ceil(needs.get(name, 0.0) / load)) for name in setup.replicas}
        found = simulate(replace(setup, replicas=replicas, routers=routers), each, seed, requests)
        return Size(cells, routers, each, replicas, found, objective.kept(found, len(setup.asked)))

    best = at(MOST_LOAD)
    if best.kept:
        return best
    low, high = LEAST_LOAD, MOST_LOAD
    best = at(low)
    while best.kept and high - low > CLOSE * high:
        tried = at(math.sqrt(low * high))
        if tried.kept:
            best, low = tried, math.sqrt(low * high)
        else:
            high = math.sqrt(low * high)
        if tried.replicas == best.replicas and not tried.kept:
            break
    return best


def demand(setup: Setup, rate: float) -> dict[str, float]:
    """Engine seconds a second at this rate, by variant, with each class in its cheapest gear."""
    menu, ways = Menu(setup.family, setup.replicas), Ways(setup.family)
    length = float(np.mean(setup.lengths))
    needs: dict[str, float] = {}
    for asked in setup.asked:
        for visit, share in ways.mean(asked.ways(menu)[-1]).items():
            table = table_of(setup.family, visit)
            row_ms = min(cell.median_ms / (cell.batch * cell.length) for cell in table.cells if cell.batch > 1) * length
            needs[visit] = needs.get(visit, 0.0) + asked.share * share * rate * row_ms / 1000
    return needs


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine has, and what it costs an hour; None: not said."""

    cores: int
    gpus: int = 0
    price_per_hour: float | None = None


def nodes_for(cpus: float, gpus: float, node: Node) -> int:
    """Machines for so many cores and GPUs.

    Raises:
        UsageError: GPUs are needed and the nodes have none.
    """
    if gpus and not node.gpus:
        raise UsageError("the variants' replicas need GPUs; say how many a node has with --gpus-per-node")
    return max(1, math.ceil(cpus / node.cores), math.ceil(gpus / node.gpus) if gpus else 0)


def needed(setup: Setup, replicas: Mapping[str, int], routers: int) -> tuple[float, float]:
    """Cores and GPUs of so many routers and replicas, as Ray is asked for them."""
    config = setup.config
    cpus = routers * config.router_cpus
    gpus = 0.0
    for name, count in replicas.items():
        own = setup.family.variant(name).resources
        cpus += count * max(own.cpus if config.replicas.cpus is None else config.replicas.cpus, config.replicas.threads)
        gpus += count * (own.gpus if config.replicas.gpus is None else config.replicas.gpus)
    return cpus, gpus


def shares_by_point(found: Simulated, asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """By class, the share of its requests that each point answered."""
    made = {}
    for number, each in enumerate(asked):
        mine = found.point[found.asked == number]
        made[each.name] = {
            name: round(float((mine == place).mean()), 4)
            for place, name in enumerate(found.points)
            if len(mine) and (mine == place).any()
        }
    return made
