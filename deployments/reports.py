"""What routers and the monitor tell each other, once a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fettle.quality import Pair, Places, PointState
from fettle.rollout import Status, Tally
from fettle.usage import Line, Used

# A router that was silent for so long is gone, and what it said with it.
FORGET_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What one router has seen of a rollout since it started, by step. `name`: the new version's.

    `ready`: all of its variants have replicas that take work; `compares`: its answers are compared with the old ones.
    """

    name: str
    ready: bool
    compares: bool
    tallies: dict[int, Tally]


@dataclass(frozen=True, slots=True)
class TrialOrder:
    """What share of the requests a new version gets now."""

    name: str
    share: float
    step: int
    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What one router has seen: its pairs and places since its last report, its telemetry in total.

    `usage`: what it has counted of API keys, where that changed.
    """

    router: str
    pairs: tuple[Pair, ...]
    places: tuple[Places, ...]
    snapshot: dict[str, Any]
    trials: tuple[TrialReport, ...] = ()
    usage: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class MonitorReply:
    """The state of every operating point, and the telemetry of all routers together with its recent history."""

    states: tuple[PointState, ...]
    live: dict[str, Any]
    orders: tuple[TrialOrder, ...] = ()
    used: Mapping[str, Used] = field(default_factory=dict)
