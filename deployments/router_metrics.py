"""What a router tells Prometheus, once a second: its counters, its queues and gears, and how busy it is itself.

Reads what `Telemetry`, the batchers and lanes, the gearboxes and the journal count anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from deployments import metrics
from deployments.exporter import EVERY_S, Exporter
from deployments.fleet import Fleet
from deployments.histogram import SIZES
from deployments.lane import Queued
from deployments.router import Router
from deployments.served import ServedFamily
from deployments.telemetry import ENDLESS, Counts, FamilyGauges
from fettle import __version__

# The loop is asked this often whether it is late.
LOOKS = 10
PART_METRICS = (metrics.TOKENIZE_SECONDS, metrics.QUEUE_SECONDS, metrics.INFERENCE_SECONDS)


class RouterMetrics:
    """See the module; `tell` is all of it, once."""

    def __init__(
        self, router: Router, fleet: Fleet, exporter: Exporter, most: Mapping[tuple[str, str], int] | None = None
    ) -> None:
        """`most`: how many replicas the configuration allows, by family and variant."""
        self._router = router
        self._fleet = fleet
        self._most = most or {}
        self._to = exporter
        self._lag_s = 0.0

    async def run(self) -> None:
        """Tell once a second, until cancelled."""
        while True:
            self._lag_s = await lag_s(EVERY_S, LOOKS)
            self.tell()

    def tell(self) -> None:
        to, router = self._to, self._router
        to.level(metrics.INFO, (__version__,), 1.0)
        to.level(metrics.ROUTER_LAG, (), self._lag_s)
        to.total(metrics.ROUTER_CPU, (), time.process_time())
        to.level(metrics.MONITOR_AGE, (), router.watch.silent_s)
        for (status, code), count in router.journal.errors.items():
            to.total(metrics.ERRORS, (str(status), code), count)
        for name, family in router.families.items():
            self._family(name, family)

    def _family(self, name: str, family: ServedFamily) -> None:
        to = self._to
        to.level(metrics.READY, (name,), float(family.is_ready))
        gauges = family.gauges()
        to.level(metrics.OBJECTIVE, (name, gauges.task), gauges.objective_ms / 1000)
        self._classes(gauges)
        for variant, batcher in family.batchers.items():
            self._variant(name, variant, batcher, family.family.version)
        counts = self._router.telemetry.families.get(name)
        if counts is not None:
            self._requests(name, counts)
            self._times(name, counts)
            self._tokens(name, counts)

    def _classes(self, gauges: FamilyGauges) -> None:
        for quality in gauges.classes:
            labels = (gauges.name, quality.name)
            self._to.level(metrics.PRESSURE, labels, min(quality.pressure, ENDLESS))
            self._to.level(metrics.GEAR, labels, float(quality.gear))
            self._to.level(metrics.GEARS, labels, float(len(quality.gears)))

    def _variant(self, family: str, variant: str, batcher: Queued, version: str) -> None:
        to, labels, stats = self._to, (family, variant), batcher.stats
        to.level(metrics.BACKLOG, labels, min(batcher.backlog_s, ENDLESS))
        to.level(metrics.QUEUED, labels, float(batcher.depth))
        to.total(metrics.BATCHES, labels, stats.batches)
        to.spread(metrics.BATCH_ROWS, labels, stats.sizes, stats.rows, SIZES)
        to.total(metrics.ROW_TOKENS, labels, stats.row_tokens)
        to.total(metrics.PADDED_TOKENS, labels, stats.batch_tokens)
        to.total(metrics.BUSY_SECONDS, labels, stats.infer_ms / 1000)
        to.total(metrics.RETRIES, labels, stats.retried)
        to.total(metrics.WITHDRAWN, labels, stats.withdrawn)
        to.total(metrics.LATE, labels, stats.late)
        standing = self._fleet.of(family, variant, version)
        to.level(metrics.REPLICAS, labels, float(standing.running))
        to.level(metrics.WANTED, labels, float(standing.wanted))
        to.level(metrics.MOST, labels, float(self._most.get(labels, 1)))
        to.total(metrics.STARTED, labels, standing.started)

    def _requests(self, family: str, counts: Counts) -> None:
        to = self._to
        for (quality, point), requests in counts.ways.items():
            to.total(metrics.REQUESTS, (family, quality, point), requests)
        for reason, requests in counts.refused.items():
            to.total(metrics.REFUSALS, (family, reason), requests)
        for (variant, stage), rows in counts.places.items():
            to.total(metrics.ROWS, (family, variant, str(stage)), rows)
        for (variant, finish), texts in counts.texts.items():
            to.total(metrics.TEXTS, (family, variant, finish), texts)
        for variant, texts in counts.given_up.items():
            to.total(metrics.ATTEMPTS, (family, variant), texts)

    def _times(self, family: str, counts: Counts) -> None:
        to = self._to
        for metric, bins, sum_ms in zip(PART_METRICS, counts.times, counts.sums, strict=False):
            to.seconds(metric, (family,), bins, sum_ms)
        for metric, times in (
            (metrics.REQUEST_SECONDS, counts.class_times),
            (metrics.FIRST_TOKEN_SECONDS, counts.first_times),
            (metrics.TOKEN_SECONDS, counts.token_times),
        ):
            for label, found in times.items():
                to.seconds(metric, (family, label), found.bins, found.sum_ms)

    def _tokens(self, family: str, counts: Counts) -> None:
        self._to.total(metrics.INPUT_TOKENS, (family,), counts.input_tokens)
        self._to.total(metrics.CACHED_TOKENS, (family,), counts.cached_tokens)
        self._to.total(metrics.OUTPUT_TOKENS, (family,), counts.output_tokens)


async def lag_s(seconds: float, looks: int) -> float:
    """Sleep so long, in parts; by how much the latest part was late."""
    worst = 0.0
    for _ in range(looks):
        due = time.monotonic() + seconds / looks
        await asyncio.sleep(seconds / looks)
        worst = max(worst, time.monotonic() - due)
    return worst
