"""Hands totals to Ray's metrics: what they grew by since the last time, so that counting itself costs nothing more.

Whoever counts tells its totals as they are once a second (`Exporter.total`, `level`, `spread`); a series that did not
change costs a comparison. Ray's agent on each node shows it all to Prometheus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ray.util import metrics as ray_metrics

from deployments.histogram import BUCKETS_S, buckets
from deployments.metrics import Kind, Metric

EVERY_S = 1.0

Labels = tuple[str, ...]


class Instrument(Protocol):
    """A counter or a gauge of Ray's: adds to one, or sets the other."""

    def __call__(self, value: float, tags: dict[str, str]) -> None: ...


def ray_instrument(metric: Metric) -> Instrument:
    """Ray's counter or gauge of this name; good only in a process that Ray started."""
    if metric.kind is Kind.GAUGE:
        level: Instrument = ray_metrics.Gauge(metric.name, metric.help, metric.labels).set
        return level
    total: Instrument = ray_metrics.Counter(metric.name, metric.help, metric.labels).inc
    return total


class Exporter:
    """See the module. Its methods run on one thread."""

    def __init__(self, instrument: Callable[[Metric], Instrument] = ray_instrument) -> None:
        self._make = instrument
        self._instruments: dict[str, Instrument] = {}
        self._parts: dict[str, tuple[Metric, ...]] = {}
        self._tags: dict[tuple[str, Labels], dict[str, str]] = {}
        self._totals: dict[tuple[str, Labels], float] = {}
        self._spreads: dict[tuple[str, Labels], list[int]] = {}

    def total(self, metric: Metric, labels: Labels, value: float) -> None:
        """What has been counted since the process began."""
        series = (metric.name, labels)
        grown = value - self._totals.get(series, 0.0)
        if grown > 0:
            self._totals[series] = value
            self._instrument(metric)(grown, self._tags_of(metric, labels))

    def level(self, metric: Metric, labels: Labels, value: float) -> None:
        """What is so now. Said again each time: what is not said for some seconds is gone from Ray's agent."""
        self._instrument(metric)(value, self._tags_of(metric, labels))

    def spread(self, metric: Metric, labels: Labels, counts: Sequence[int], total: float, les: Sequence[str]) -> None:
        """A histogram: how many since the process began in each bucket, the last of which has no end."""
        series = (metric.name, labels)
        if self._spreads.get(series) == counts:
            return
        self._spreads[series] = list(counts)
        if metric.name not in self._parts:
            self._parts[metric.name] = metric.parts
        bucket, count, summed = self._parts[metric.name]
        below = 0
        for number, le in zip(counts, les, strict=True):
            below += number
            self.total(bucket, (*labels, le), below)
        self.total(count, labels, below)
        self.total(summed, labels, total)

    def seconds(self, metric: Metric, labels: Labels, bins: Sequence[int], sum_ms: float) -> None:
        """A histogram of times, from the bins of `deployments.histogram` and their sum in milliseconds."""
        self.spread(metric, labels, buckets(bins), sum_ms / 1000, BUCKETS_S)

    def _instrument(self, metric: Metric) -> Instrument:
        found = self._instruments.get(metric.name)
        if found is None:
            found = self._instruments[metric.name] = self._make(metric)
        return found

    def _tags_of(self, metric: Metric, labels: Labels) -> dict[str, str]:
        series = (metric.name, labels)
        found = self._tags.get(series)
        if found is None:
            found = self._tags[series] = dict(zip(metric.labels, labels, strict=True))
        return found
