"""Who decides how many replicas the simulated fleet has: the product's policy, Ray's own, and an oracle."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.serve import autoscaling_policy as ray_policy
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.fleet import Scene, View
from deployments.scaling import ROUTER, loads_of
from fettle.autoscale import LONG_S, SHORT_S, Decision, Load, Past, arrivals, certain, sized
from fettle.config import AutoscaleConfig

FINE = 10  # parts of a second in which the oracle looks at a queue


@dataclass(slots=True)
class Fettle:
    """The product's policy, with what the routers would report. `took_s`: its own time for each decision on all."""

    config: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    took_s: list[float] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    _past: dict[str, Past] = field(default_factory=dict)

    def decide(self, now: float, views: Sequence[View]) -> Mapping[str, int]:
        started = time.perf_counter()
        loads = {view.name: _load(view) for view in views}
        made, self._past = sized(loads, self._past, now, dict.fromkeys(loads, self.config))
        self.took_s.append(time.perf_counter() - started)
        self.decisions += [(now, each) for each in made.values() if each.replicas != each.before]
        return {name: each.replicas for name, each in made.items()}


def _load(view: View) -> Load:
    return Load(
        running=view.running,
        wanted=view.wanted,
        least=view.least,
        most=view.most,
        rate=arrivals([view.counts], LONG_S)[0],
        recent=certain(*arrivals([view.counts], SHORT_S)),
        backlog_s=view.backlog_s,
        waiting=view.waiting,
    )


class Ray:
    """Ray's own policy: the real function, with its delays and bounds, on what Ray counts: calls or requests that are
    under way or wait, as a mean over the look-back period.
    """

    def __init__(self, config: AutoscalingConfig, *, calls: bool) -> None:
        self._config, self._calls = config, calls
        self._policy = ray_policy._apply_autoscaling_config(ray_policy.replica_queue_length_autoscaling_policy)
        self._states: dict[str, dict[str, Any]] = {}
        self._ongoing: dict[str, deque[float]] = {}

    def decide(self, now: float, views: Sequence[View]) -> Mapping[str, int]:
        # The function reads the clock itself.
        real, ray_policy.time = ray_policy.time, SimpleNamespace(time=lambda: now)
        try:
            return {view.name: self._one(view) for view in views}
        finally:
            ray_policy.time = real

    def _one(self, view: View) -> int:
        length = max(1, round(self._config.look_back_period_s))
        ongoing = self._ongoing.setdefault(view.name, deque(maxlen=length))
        ongoing.append(view.calls if self._calls else view.requests)
        context = _context(view.name, view.running, view.wanted, {})
        context._total_num_requests_value = sum(ongoing) / len(ongoing)
        context.policy_state = self._states.get(view.name, {})
        context.config = self._config
        wanted, self._states[view.name] = self._policy(context)
        return min(max(math.ceil(wanted), view.least), view.most)


def reporting_ms(deployments: Sequence[str], routers: int = 8, seconds: int = 20) -> float:
    """What it takes to read the reports of so many routers about all deployments from Ray's contexts; the median."""
    figures = ("work_s", "rows", "backlog_s", "waiting", "batches")
    names = [f"{name}|{figure}" for name in [*deployments, "router"] for figure in figures]
    series = [TimeStampedValue(float(at), float(at)) for at in range(seconds)]
    raw = {name: {f"router{number}": series for number in range(routers)} for name in names}
    took = []
    for _ in range(50):
        contexts = {name: _context(name, 30, 30, raw) for name in [*deployments, ROUTER]}
        started = time.perf_counter()
        loads_of(contexts, seconds - 0.5)
        took.append(time.perf_counter() - started)
    return float(1000 * np.median(took))


def _context(name: str, running: int, wanted: int, raw: Mapping[str, Any]) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=DeploymentID(name=name, app_name="fettle"),
        deployment_name=name,
        app_name="fettle",
        current_num_replicas=running,
        target_num_replicas=wanted,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=dict(raw),
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=1000,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )


@dataclass(slots=True)
class Plan:
    """Numbers by second that were settled before."""

    wanted: Mapping[str, Sequence[int]]

    def decide(self, now: float, views: Sequence[View]) -> Mapping[str, int]:
        at = int(now)
        return {view.name: self.wanted[view.name][at] for view in views}


def oracle(scene: Scene, work: Mapping[str, Sequence[float]], patience_s: float) -> Plan:
    """Who knows what comes: in every second the fewest replicas that keep each tenth of it from waiting longer.

    `work`: by variant, seconds of work that come in each `1 / FINE` s. A replica is asked for as much earlier as it
    takes to start, and kept through a gap that is shorter than that, which costs no more than to start another.
    """
    wanted = {}
    for name, comes in work.items():
        kind = scene.kinds.get(name)
        start = round(kind.start_s) if kind is not None else round(max(each.start_s for each in scene.kinds.values()))
        wanted[name] = _ahead(_fewest(comes, patience_s), start)
    return Plan(wanted)


def _fewest(comes: Sequence[float], patience_s: float) -> list[int]:
    """The fewest replicas in each second, whole, one at least. What waits is carried over."""
    found, waits = [], 0.0
    for second in range(len(comes) // FINE):
        parts = comes[second * FINE : (second + 1) * FINE]
        count = max(1, math.floor(sum(parts)))
        while (left := _left(parts, waits, count, patience_s)) is None:
            count += 1
        waits = left
        found.append(count)
    return found


def _left(parts: Sequence[float], waits: float, count: int, patience_s: float) -> float | None:
    """Work left at the second's end; None if at some time more waited than `patience_s` is enough for."""
    for part in parts:
        waits = max(0.0, waits + part - count / FINE)
        if waits > count * patience_s:
            return None
    return waits


def _ahead(running: Sequence[int], start: int) -> list[int]:
    """What must be asked for so that these run: the most of the seconds until a start asked for now would be over."""
    counts = np.array(running)
    return [int(counts[second : second + start + 1].max()) for second in range(len(counts))]
