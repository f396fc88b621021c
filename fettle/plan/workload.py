"""What requests ask for: lengths, classes, and of each row how far along its way it goes.

Where a row leaves is drawn by the shares that `test` gave, independently of its length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fettle.bench.arrivals import Arrivals, merged, scaled, steady
from fettle.bench.traffic import Flow
from fettle.family import Family
from fettle.manifest import Step
from fettle.menu import EXACT, Menu, Stretch, Way, stage_costs

Arriving = Iterator[tuple[float, int, int]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One class of a mix: its part of the requests, and the largest disagreement it takes; or one variant."""

    name: str
    share: float
    tolerance: float
    variant: str | None = None

    def ways(self, menu: Menu) -> tuple[Way, ...]:
        """Who may answer, from the most faithful to the cheapest."""
        return (menu.pinned(self.variant),) if self.variant else menu.gears(self.tolerance)


@dataclass(frozen=True, slots=True)
class Visit:
    """A row at one step: of a whole run there, the parts that the stages take which it goes through."""

    variant: str
    parts: tuple[float, ...]

    @property
    def share(self) -> float:
        return sum(self.parts)


class Ways:
    """Of each way the visits that a row makes, drawn by where `test`'s rows were answered."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._drawn: dict[str, tuple[list[tuple[Visit, ...]], list[float]]] = {}

    def draw(self, way: Way, chance: float) -> tuple[Visit, ...]:
        """`chance` from 0 to 1 says which."""
        if way.name not in self._drawn:
            self._drawn[way.name] = self._places(way)
        places, upto = self._drawn[way.name]
        for place, limit in zip(places, upto, strict=True):
            if chance < limit:
                return place
        return places[-1]

    def mean(self, way: Way) -> dict[str, float]:
        """Of a whole run of each variant, what a row takes there on average."""
        places, upto = self._places(way)
        found: dict[str, float] = {}
        before = 0.0
        for visits, limit in zip(places, upto, strict=True):
            for visit in visits:
                found[visit.variant] = found.get(visit.variant, 0.0) + (limit - before) * visit.share
            before = limit
        return found

    def _places(self, way: Way) -> tuple[list[tuple[Visit, ...]], list[float]]:
        test = None if way.point is None else way.point.test
        if test is None:
            # Never tried: every row goes through all, as the menu reckons.
            visits = tuple(Visit(stretch.step.variant, self._parts(stretch)) for stretch in way.stretches)
            return [visits], [1.0]
        places, shares = [], []
        before: tuple[Visit, ...] = ()
        for stretch, answered in zip(way.stretches, test.answered, strict=True):
            parts = self._parts(stretch)
            for stage, share in enumerate(answered):
                places.append((*before, Visit(stretch.step.variant, parts[: stage + 1])))
                shares.append(share)
            before = (*before, Visit(stretch.step.variant, parts))
        total = sum(shares)
        return places, [limit / total for limit in accumulate(shares)]

    def _parts(self, stretch: Stretch) -> tuple[float, ...]:
        return stage_parts(self._family, stretch.step)


def stage_parts(family: Family, step: Step) -> tuple[float, ...]:
    """Of a whole run of the step's variant, the part that each stage takes."""
    costs = stage_costs(family, step)
    return tuple(cost / sum(costs) for cost in costs)


def mixed(flows: Sequence[Flow]) -> list[Asked]:
    """The classes of a mix, their shares adding up to 1.

    A name that is no number must be `exact` or a variant: names from a configuration are not known here.
    """
    total = sum(flow.share for flow in flows)
    made = []
    for flow in flows:
        wish = flow.max_disagreement
        if isinstance(wish, str) and wish != EXACT:
            made.append(Asked(flow.tag, flow.share / total, 1.0, wish))
        else:
            made.append(Asked(flow.tag, flow.share / total, 0.0 if wish == EXACT else float(wish or 0.0)))
    return made


def arrivals(asked: Sequence[Asked], rate: float, texts: int, seed: int, kind: Arrivals = "poisson") -> Arriving:
    """Second, number of the class, number of the text; without an end."""
    profiles = [scaled(steady(rate), each.share) for each in asked]
    for number, (at, flow) in enumerate(merged(profiles, kind, seed)):
        yield at, flow, number % texts


def chances(seed: int) -> random.Random:
    """The source of where rows leave."""
    return random.Random(f"{seed} ways")
