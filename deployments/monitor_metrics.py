"""What the monitor tells Prometheus of each certified point: the promise, what was compared, what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from deployments import metrics
from deployments.exporter import Exporter
from fettle.quality import PointState

# Of evidence for a point, which is no evidence against it, there is no end: what is below this is shown as this.
LEAST_EVIDENCE = -9.0


def tell_points(states: Iterable[PointState], to: Exporter) -> None:
    for state in states:
        labels = (state.family, state.point)
        to.level(metrics.COMPARED, labels, float(state.shadows))
        to.level(metrics.CHANGED, labels, float(state.disagreements))
        to.level(metrics.EVIDENCE, labels, _log10(state.evidence))
        to.level(metrics.ALARM, labels, _log10(state.alarm_at))
        to.level(metrics.BOUND, labels, state.upper_bound)
        to.level(metrics.LEVEL, labels, state.alpha)
        to.level(metrics.REVOKED, labels, float(state.status == "revoked"))
        to.level(metrics.DRIFTING, labels, float(state.drift is not None and state.drift.warning))


def _log10(value: float) -> float:
    return max(LEAST_EVIDENCE, math.log10(value)) if value > 0 else LEAST_EVIDENCE
