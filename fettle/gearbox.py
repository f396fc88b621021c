"""The gears of one family's classes at one router: readings of pressure in, gear numbers out.

When to shift is `fettle.gears`; here is what the pressure of a class is: the predicted drain time along the way that it
uses now, over the latency objective.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from fettle.config import GearConfig
from fettle.gears import Gear, path_drain_s, shifted
from fettle.menu import Menu, Way

logger = logging.getLogger("ray.serve.fettle")

# How often readings are taken: `fettle.gears.SMOOTHING` is made for it.
EVERY_S = 0.1


class Backlog(Protocol):
    """A variant's queue, as far as gears are about it."""

    @property
    def backlog_s(self) -> float:
        """Predicted seconds until all that was admitted is done."""


class Gearbox:
    """One gear for each class, by its level; those that allow degraded answers have gears of their own."""

    def __init__(self, menu: Menu, batchers: Mapping[str, Backlog], config: GearConfig, family: str = "") -> None:
        """`family` is what the log calls it."""
        self._menu = menu
        self._family = family
        self._batchers = batchers
        self._config = config
        self._gears: dict[tuple[float, bool], Gear] = {(level, False): Gear() for level in menu.levels}

    def number(self, tolerance: float, degraded: bool) -> int:
        """The gear of a class now."""
        key = (self._menu.level(tolerance), degraded)
        if key not in self._gears:
            self._gears[key] = Gear()
        return self._gears[key].number

    def gear(self, level: float) -> Gear:
        """For display; the exact class has one gear, and the reference's pressure."""
        return self._gears.get((level, False), Gear())

    def tick(self, now: float) -> None:
        """Take a reading for each class; call it every `EVERY_S`."""
        for (level, degraded), gear in self._gears.items():
            ways = self._menu.gears(level, degraded=degraded)
            number = min(gear.number, len(ways) - 1)
            behind = self._pressure(ways[number - 1]) if number else 0.0
            reading = self._pressure(ways[number])
            new = self._gears[level, degraded] = shifted(gear, reading, now, len(ways), self._config, behind=behind)
            if new.number != gear.number:
                facts = {"family": self._family, "class": f"{level:g}", "gear": new.number, "degraded": degraded}
                facts |= {"pressure": round(new.pressure, 3), "point": ways[min(new.number, len(ways) - 1)].name}
                logger.info("a class shifts its gear", extra={"kind": "gear", **facts})

    def _pressure(self, way: Way) -> float:
        backlogs = [self._batchers[variant].backlog_s for variant in way.variants]
        return path_drain_s(backlogs, [stretch.reach for stretch in way.stretches]) * 1000 / self._config.objective_ms
