"""What may answer at a family: its certified operating points by class, its reference, each variant by itself.

Built from the family, the variants that are served, and the certificates that an alarm has revoked; built anew when one
of these changes. Chooses nothing: which of a class's points answers is a matter of load (`fettle.gears`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fettle.errors import RequestError
from fettle.family import Family
from fettle.manifest import OperatingPoint, Step
from fettle.points import Gates, check_steps, early_gates, fingerprint, whole

EXACT: Literal["exact"] = "exact"
# Of the rows that a step gets, where `test` has not said how many go on.
UNKNOWN_REACH = 0.5


@dataclass(frozen=True, slots=True)
class Stretch:
    """One step as it is served. `reach`: share of rows that get here; `share`: of a whole run's cost that they take."""

    step: Step
    reach: float
    share: float
    gates: Gates | None


@dataclass(frozen=True, slots=True)
class Way:
    """A way to answer, and what is promised of it: a certified bound, "exact", or None for no promise."""

    name: str
    stretches: tuple[Stretch, ...]
    bound: float | Literal["exact"] | None = None
    point: OperatingPoint | None = None
    fingerprint: str = ""
    # Of its stretches, in order.
    variants: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "variants", tuple(stretch.step.variant for stretch in self.stretches))

    @property
    def alpha(self) -> float:
        """The level that it was certified at; 0 for the reference, 1 without a promise."""
        if self.point is not None:
            return self.point.certificate.alpha
        return 0.0 if self.bound == EXACT else 1.0


class Menu:
    """See the module. `points` are those that may be served now, from the strictest to the cheapest."""

    def __init__(self, family: Family, served: Collection[str], revoked: Collection[str] = ()) -> None:
        """Raises FamilyError if a point does not fit the variants."""
        self._family = family
        self._served = frozenset(served)
        # Made once: a request that names a variant, or wants the reference's own answer, comes by here each time.
        self._pinned = {name: _pinned_way(family, name) for name in family.variants}
        certified = [_way_of(point, family) for point in family.manifest.points]
        able = [way for way in certified if self._served.issuperset(way.variants)]
        self.points = _useful([way for way in able if way.fingerprint not in revoked])
        self.revoked = [way for way in able if way.fingerprint in revoked]
        # The levels that differ in what may answer.
        self.levels = [way.alpha for way in self.points]
        self._gears: dict[tuple[int, bool], tuple[Way, ...]] = {}

    def pinned(self, variant: str) -> Way:
        """One variant all the way, with no promise unless it is the reference."""
        return self._pinned[variant]

    def reference(self) -> Way:
        """Raises RequestError if the reference is not served."""
        name = self._family.manifest.reference
        if name not in self._served:
            raise RequestError(
                f"nothing that is served here is certified at this level, and the reference {name!r} is not served; "
                "allow more disagreement or name a variant",
                param="max_disagreement",
            )
        return self.pinned(name)

    def gears(self, tolerance: float, *, degraded: bool = False) -> tuple[Way, ...]:
        """Who may answer at this level, from the most faithful to the cheapest: certified points, else the reference.

        `degraded` adds the cheaper points that are certified at weaker levels only.

        Raises:
            RequestError: no point is certified at it, and the reference is not served.
        """
        admissible = bisect_right(self.levels, tolerance)
        gears = self._gears.get((admissible, degraded))
        if gears is None:
            faithful = self.points[:admissible] or [self.reference()]
            gears = (*faithful, *(self.points[admissible:] if degraded else []))
            self._gears[admissible, degraded] = gears
        return gears

    def level(self, tolerance: float) -> float:
        """The level that this tolerance amounts to: the weakest certified one within it, 0 for the reference."""
        admissible = bisect_right(self.levels, tolerance)
        return self.levels[admissible - 1] if admissible else 0.0


def _pinned_way(family: Family, variant: str) -> Way:
    [step] = whole(family.variant(variant))
    exact = variant == family.manifest.reference
    return Way(variant, (Stretch(step, 1.0, 1.0, None),), EXACT if exact else None)


def _useful(ways: Sequence[Way]) -> list[Way]:
    """By level; a point that costs no less than a stricter one is of no use."""
    kept: list[Way] = []
    for way in sorted(ways, key=lambda way: (way.alpha, _cost(way))):
        if not kept or _cost(way) < _cost(kept[-1]):
            kept.append(way)
    return kept


def _cost(way: Way) -> float:
    return way.point.expected_cpu_ms if way.point is not None else 0.0


def _way_of(point: OperatingPoint, family: Family) -> Way:
    check_steps(point.steps, family.variants)
    answered = None if point.test is None else point.test.answered
    stretches, reach = [], 1.0
    for number, step in enumerate(point.steps):
        here = None if answered is None else answered[number]
        gates = early_gates(step) if any(gate.threshold <= 1 for gate in step.gates[:-1]) else None
        costs = stage_costs(family, step)
        stretches.append(Stretch(step, reach, _work_share(costs, here, reach), gates))
        reach = reach * UNKNOWN_REACH if here is None else max(0.0, reach - sum(here))
    bound = point.certificate.upper_bound
    return Way(point.id, tuple(stretches), bound, point, fingerprint(point))


def stage_costs(family: Family, step: Step) -> list[float]:
    """What each stage of the step's variant takes alone; equal parts where it was not measured."""
    measured = family.variant(step.variant).measured
    costs = measured.stage_cpu_ms if measured is not None else []
    return costs if len(costs) == len(step.gates) else [1.0] * len(step.gates)


def _work_share(costs: Sequence[float], answered: Sequence[float] | None, reach: float) -> float:
    """Mean cost of a row that gets to this step over that of one that goes through all of its stages."""
    if answered is None or reach <= 0:
        return 1.0
    spent, staying = 0.0, 1.0
    for cost, left in zip(costs, answered, strict=True):
        spent += staying * cost
        staying = max(0.0, staying - left / reach)
    return spent / sum(costs)
