"""What routers and the monitor tell each other, once a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fettle.quality import Pair, Places, PointState


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What one router has seen: its pairs and places since its last report, its telemetry in total."""

    router: str
    pairs: tuple[Pair, ...]
    places: tuple[Places, ...]
    snapshot: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MonitorReply:
    """The state of every operating point, and the telemetry of all routers together with its recent history."""

    states: tuple[PointState, ...]
    live: dict[str, Any]
