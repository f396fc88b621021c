"""Which operating point a quality class uses at the present load: pure functions of pressure and time.

A class has gears: the points that may answer it, from the most faithful to the cheapest. It rests in the first, where
capacity that nobody needs buys answers that are closer to the original's than was asked for; pressure shifts it
towards the last. Pressure is the predicted time to drain what waits on the present point's way, over the latency
objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fettle.config import GearConfig

# A shift shows in the queues after a batch or two; to shift again before that would overshoot.
SETTLE_S = 0.5
# From this pressure on, one gear at a time is too slow.
URGENT = 3.0
LONGEST_DWELL = 32.0
# Weight of the newest reading, ten a second: batches come and go faster than a load changes.
SMOOTHING = 0.3


@dataclass(frozen=True, slots=True)
class Gear:
    """`number` counts from 0, the most faithful. Times are seconds on one clock; `dwells` multiplies the dwell time."""

    number: int = 0
    pressure: float = 0.0
    shifted: float = float("-inf")
    returned: float | None = None
    calm_since: float | None = None
    dwells: float = 1.0


def shifted(gear: Gear, reading: float, now: float, gears: int, config: GearConfig, *, behind: float = 0.0) -> Gear:
    """The gear after one more reading of the pressure, and of that `behind` it: on the next more faithful way.

    Up, to cheaper points, as soon as the smoothed pressure exceeds `up`; back, one at a time, once it has stayed below
    `down`, and the way back not above `up`, for the dwell time. A return that has to be taken back soon shows that the
    lower gear does not carry the load: the dwell time then doubles, so that a steady load between two gears makes ever
    fewer shifts.
    """
    pressure = gear.pressure + SMOOTHING * (reading - gear.pressure)
    number = min(gear.number, gears - 1)
    gear = replace(gear, pressure=pressure, number=number)
    if pressure > config.up:
        gear = replace(gear, calm_since=None)
        if number < gears - 1 and now - gear.shifted >= SETTLE_S:
            return _up(gear, gears - 1 if pressure > URGENT else number + 1, now, config)
        return gear
    if pressure >= config.down or behind > config.up or number == 0:
        return replace(gear, calm_since=None)
    if gear.calm_since is None:
        return replace(gear, calm_since=now)
    if now - gear.calm_since < config.dwell_s * gear.dwells:
        return gear
    return replace(gear, number=number - 1, shifted=now, returned=now, calm_since=None)


def path_drain_s(backlogs: Sequence[float], reach: Sequence[float]) -> float:
    """Predicted seconds until a row that comes now has its turns: each step's backlog, as often as rows reach it."""
    return sum(backlog * share for backlog, share in zip(backlogs, reach, strict=True))


def _up(gear: Gear, number: int, now: float, config: GearConfig) -> Gear:
    failed = gear.returned is not None and now - gear.returned < 2 * config.dwell_s * gear.dwells
    dwells = min(2 * gear.dwells, LONGEST_DWELL) if failed else 1.0
    return replace(gear, number=number, shifted=now, returned=None, calm_since=None, dwells=dwells)
