"""Autoscaling in Serve's controller: what routers report in, how many replicas of everything out.

Once a second all deployments of an application are decided together by `fettle.autoscale`. What it needs comes from the
routers through Ray's own reports of replicas (`record_autoscaling_stats`), each a series of the last seconds.

What Ray itself counts is left aside: calls under way, which here are batches, and streams (its issue 61551: what
streams leave behind keeps deployments up; 63279: means over a look-back period make counts swing; 26455: a delay below
that period never sees what it waits for). Decisions are applied once, when they are made, without Ray's delays and
factors. At zero Ray starts one replica for a call that waits at a handle, before any policy is asked, and the rest when
it runs; a decision that was not taken is not kept, so this is never undone by an older one (59076).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments import metrics
from deployments.exporter import Exporter
from fettle.autoscale import LONG_S, SHORT_S, Budget, Count, Decision, Load, Past, arrivals, certain, sized
from fettle.config import AutoscaleConfig

logger = logging.getLogger("ray.serve.fettle")

ROUTER = "RouterIngress"
POLICY = "deployments.autoscaling.EachDeployment"
# Routers report so often; a report that is older than this is of one that does not answer.
REPORT_EVERY_S = 1.0
STALE_S = 6.0
DECIDE_EVERY_S = 1.0
# A deployment whose context did not come for so long is gone.
GONE_S = 10.0
KEPT_DECISIONS = 200

Series = Sequence[Any]  # of Ray's TimeStampedValue


def scaling_config(
    least: int, most: int, autoscale: AutoscaleConfig, memory: int = 0, fallback: float = 1.0
) -> AutoscalingConfig:
    """What a deployment says to Serve so that this policy decides about it. `memory`: bytes of one replica.

    Ray's delays are zero, since the policy has its own. `fallback`: calls a replica that Ray's own would aim at.
    """
    settings = {"autoscale": autoscale.model_dump(), "memory": memory}
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=fallback,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        metrics_interval_s=REPORT_EVERY_S,
        look_back_period_s=LONG_S + 5,
        policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs=settings),
    )


class Scaling:
    """One application's deployments, by name. `decisions`: the last ones that changed something."""

    def __init__(self, clock: Callable[[], float] = time.time, exporter: Exporter | None = None) -> None:
        self.decisions: deque[tuple[float, Decision]] = deque(maxlen=KEPT_DECISIONS)
        self._clock, self._exporter = clock, exporter
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._contexts: dict[str, tuple[float, AutoscalingContext]] = {}
        self._past: dict[str, Past] = {}
        self._due: dict[str, int] = {}
        self._decided = float("-inf")

    def hear(self, context: AutoscalingContext) -> None:
        """A deployment as it is now."""
        self._contexts[context.deployment_name] = self._clock(), context

    def changes(self) -> dict[str, int]:
        """Decide where it is time; what is to change by this, or was decided and not yet taken (`take`)."""
        now = self._clock()
        if now - self._decided >= DECIDE_EVERY_S:
            self._decided = now
            self._decide(now)
        return self._due

    def take(self, name: str, otherwise: int) -> int:
        """The number for a deployment, once; `otherwise` where nothing is to change."""
        return self.changes().pop(name, otherwise)

    def _decide(self, now: float) -> None:
        self._contexts = {name: seen for name, seen in self._contexts.items() if now - seen[0] < GONE_S}
        contexts = {name: context for name, (_, context) in self._contexts.items()}
        loads = loads_of(contexts, now)
        settings = {name: _settings(contexts[name]) for name in loads}
        configs = {name: autoscale for name, (autoscale, _) in settings.items()}
        # Whoever is not reported on is forgotten, so that nothing goes before a whole window was seen again.
        made, self._past = sized(loads, self._past, now, configs, _budget(settings))
        for name, decision in made.items():
            self._due.pop(name, None)
            if decision.replicas != decision.before:
                self._due[name] = decision.replicas
                self._tell(now, decision)

    def _tell(self, now: float, decision: Decision) -> None:
        self.decisions.append((now, decision))
        # Seldom, and what an operator asks about first: so not below the level that the service logs at.
        logger.warning("%s", decision)
        labels = (decision.deployment, "up" if decision.replicas > decision.before else "down", decision.cause)
        self._counts[labels] += 1
        if self._exporter is not None:
            self._exporter.total(metrics.DECISIONS, labels, self._counts[labels])


def loads_of(contexts: Mapping[str, AutoscalingContext], now: float) -> dict[str, Load]:
    """Every deployment's load; nothing while no router reports, and then all stay as they are."""
    router = contexts.get(ROUTER)
    if router is None:
        return {}
    reports = _fresh(router.raw_metrics or {}, now)
    routers = {replica for by_replica in reports.values() for replica in by_replica}
    if not routers:
        return {}
    # Of routers that have not reported yet, or not lately, as much is expected as of the others.
    missing = max(1.0, router.current_num_replicas / len(routers))
    loads = {}
    for name, context in contexts.items():
        if name == ROUTER:
            loads[name] = _load(context, reports, "router", missing, waiting=True)
        else:
            # What no router reports on is asked by none: replaced versions, whose routers have gone.
            loads[name] = _load(context, reports, name, missing)
    return loads


def _load(
    context: AutoscalingContext,
    reports: Mapping[str, Mapping[Any, Series]],
    name: str,
    missing: float,
    waiting: bool = False,
) -> Load:
    work, rows = reports.get(f"{name}|work_s", {}), reports.get(f"{name}|rows", {})
    counts = [_counts(work[replica], rows.get(replica, ())) for replica in work]
    rate, _ = arrivals(counts, LONG_S)
    recent = certain(*arrivals(counts, SHORT_S))
    served = any(series[-1].value > series[0].value for series in reports.get(f"{name}|batches", {}).values())
    return Load(
        running=context.current_num_replicas,
        wanted=context.target_num_replicas,
        least=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
        rate=rate * missing,
        recent=recent * missing,
        backlog_s=sum(_last(reports, f"{name}|backlog_s")) * missing,
        waiting=waiting or served or any(_last(reports, f"{name}|waiting")),
    )


def _fresh(metrics: Mapping[str, Mapping[Any, Series]], now: float) -> dict[str, dict[Any, Series]]:
    found = {}
    for name, by_replica in metrics.items():
        fresh = {each: series for each, series in by_replica.items() if series and now - series[-1].timestamp < STALE_S}
        if fresh and "|" in name:
            found[name] = fresh
    return found


def _counts(work: Series, rows: Series) -> list[Count]:
    # Both are noted at the same times; the older ends may differ by what was pruned.
    pairs = zip(reversed(work), reversed(rows), strict=False)
    return [Count(one.timestamp, one.value, other.value) for one, other in pairs][::-1]


def _last(reports: Mapping[str, Mapping[Any, Series]], name: str) -> Iterable[float]:
    return [series[-1].value for series in reports.get(name, {}).values()]


def _settings(context: AutoscalingContext) -> tuple[AutoscaleConfig, int]:
    given = context.config.policy.policy_kwargs
    return AutoscaleConfig.model_validate(given.get("autoscale", {})), int(given.get("memory", 0))


def _budget(settings: Mapping[str, tuple[AutoscaleConfig, int]]) -> Budget | None:
    bounds = [autoscale.memory_bytes for autoscale, _ in settings.values() if autoscale.memory_bytes is not None]
    if not bounds:
        return None
    return Budget(min(bounds), {name: memory for name, (_, memory) in settings.items()})


_scalings: dict[str, Scaling] = {}


def scaling_of(application: str) -> Scaling:
    """The one of this application, in this process: Serve calls the policies of all deployments in its controller."""
    if application not in _scalings:
        _scalings[application] = Scaling(exporter=Exporter())
    return _scalings[application]
