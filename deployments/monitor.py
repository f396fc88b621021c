"""The monitor: what all routers saw, in one place. Keeps the evidence, latches alarms, and adds up the telemetry.

Each router calls `sync` once a second with its shadow pairs and its counters, and gets back what is to be known by all.
Pairs are on the disk when it returns, so the monitor can be killed at any moment and knows everything that a router was
told it knows. Chooses no route: routers leave out what is revoked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ray import serve

from deployments.exporter import EVERY_S, Exporter
from deployments.journal import speak
from deployments.monitor_metrics import tell_points
from deployments.reports import FORGET_AFTER_S
from deployments.reports import MonitorReply as MonitorReply
from deployments.reports import RouterReport as RouterReport
from deployments.reports import TrialOrder as TrialOrder
from deployments.rollouts import Rollout, RolloutView, rollouts_of
from deployments.telemetry import History, merged
from deployments.versions import Version, start_failure, versions_of
from fettle.config import MonitorConfig, ServeConfig
from fettle.drift import DriftWatch, watch_of
from fettle.errors import FamilyError, FettleError, UsageError
from fettle.family import FAMILY_FILE, parse_manifest
from fettle.manifest import FamilyManifest, OperatingPoint, VariantEntry
from fettle.points import fingerprint
from fettle.quality import Pair, Places, PointState, QualityStore, store_path
from fettle.usage import Ledger, Used, ledger_path

logger = logging.getLogger("ray.serve.fettle")

Result = TypeVar("Result")


class WatchedFamily:
    """One family under watch: its points as the file on the disk has them now, their evidence and their drift."""

    def __init__(self, name: str, directory: Path, config: MonitorConfig) -> None:
        """Raises FamilyError if it cannot be read, QualityError if its evidence cannot be kept."""
        self.name = name
        self.points: list[OperatingPoint] = []
        self._file = directory / FAMILY_FILE
        self._drift: dict[str, DriftWatch | None] = {}
        self._read: tuple[int, ...] | None = None
        self._variants: list[VariantEntry] | None = None
        self._complained_of: object = None
        self._store = QualityStore(store_path(directory, name, config.directory), config.delta)
        try:
            self._load(_signature(self._file))
        except BaseException:  # whatever it is, nobody else can close the store
            self._store.close()
            raise

    def refresh(self) -> None:
        """Read the family's file again if it changed; what cannot be read, or was rebuilt, changes nothing."""
        try:
            signature = _signature(self._file)
            if signature != self._read:
                self._load(signature)
        except (FamilyError, OSError) as error:
            # Tried again each time, and said once.
            if self._complained_of != str(error):
                logger.warning("%s: the operating points stay as they were: %s", self.name, error)
            self._complained_of = str(error)
        else:
            self._complained_of = None

    def add(self, pairs: list[Pair], places: list[Places]) -> None:
        """Raises QualityError if the pairs cannot be written; then nothing is counted."""
        self._store.add(pairs)
        for seen in places:
            drift = self._drift.get(seen.fingerprint)
            if drift is not None:
                drift.add(seen.answered, seen.scores)

    def states(self) -> tuple[PointState, ...]:
        verdicts = {mark: None if drift is None else drift.verdict for mark, drift in self._drift.items()}
        return self._store.states(self.name, self.points, verdicts)

    def close(self) -> None:
        self._store.close()

    def _load(self, signature: tuple[int, ...]) -> None:
        manifest = parse_manifest(self._file, FamilyManifest)
        if self._variants is not None and manifest.variants != self._variants:
            # Routers go on with the old variants, so the alarms that they need are those of the old points.
            raise FamilyError("the family was rebuilt; restart the service to serve it as it is now")
        points = manifest.points
        self._store.watch(self.name, points)
        marks = {fingerprint(point): point for point in points}
        self._drift = {mark: self._drift.get(mark) or watch_of(point) for mark, point in marks.items()}
        self.points, self._read, self._variants = points, signature, manifest.variants


class Monitor:
    """Without Ray. Files are read and written by one thread, in order, so that health checks are always answered."""

    def __init__(
        self,
        families: Mapping[str, str],
        config: MonitorConfig,
        clock: Callable[[], float] = time.time,
        rollouts: Mapping[str, Rollout] | None = None,
        ledger: Path | None = None,
    ) -> None:
        """`families`: the directory of each, by the name under which it is served; `rollouts` by the new one's name.

        `ledger`: where the use of API keys is kept, if there are any with quotas.

        Raises:
            FamilyError: a family cannot be read.
            QualityError, UsageError: the evidence about one, or the ledger, cannot be kept where it should be.
        """
        self._families: dict[str, WatchedFamily] = {}
        self._ledger = None if ledger is None else Ledger(ledger, clock())
        try:
            for name, directory in families.items():
                self._families[name] = WatchedFamily(name, Path(directory), config)
        except BaseException:  # as above, of the families before
            self._close_families()
            raise
        self._clock = clock
        self._rollouts = rollouts or {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._routers: dict[str, tuple[float, dict[str, Any]]] = {}
        self._history = History()

    async def sync(self, report: RouterReport) -> MonitorReply:
        """Take a router's report in; its pairs are on the disk when this returns.

        Raises:
            QualityError: they cannot be written. The router keeps them and comes again.
        """
        states, orders, used = await self._run(self._record, report)
        return MonitorReply(states, self._live(report), orders, used)

    async def rollouts(self) -> list[RolloutView]:
        return await self._run(lambda: [rollout.view() for rollout in self._rollouts.values()])

    async def end_rollout(self, name: str, promote: bool) -> None:
        """Raises UsageError if there is none of this name, or it is over."""
        if name not in self._rollouts:
            raise UsageError(f"there is no rollout of {name!r}")
        await self._run(self._rollouts[name].end, promote)

    async def _run(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        self._close_families()

    def _record(
        self, report: RouterReport
    ) -> tuple[tuple[PointState, ...], tuple[TrialOrder, ...], Mapping[str, Used]]:
        pairs: dict[str, list[Pair]] = {name: [] for name in self._families}
        places: dict[str, list[Places]] = {name: [] for name in self._families}
        for pair in report.pairs:
            if pair.family in pairs:
                pairs[pair.family].append(pair)
            else:
                logger.warning("a pair of %s, which is not watched here, is left out", pair.family)
        for seen in report.places:
            if seen.family in places:
                places[seen.family].append(seen)
        states: list[PointState] = []
        for name, family in self._families.items():
            family.refresh()
            family.add(pairs[name], places[name])
            states += family.states()
        for trial in report.trials:
            if trial.name in self._rollouts:
                self._rollouts[trial.name].take(report.router, trial)
        used: Mapping[str, Used] = {}
        if self._ledger is not None:
            self._ledger.add(report.router, report.usage)
            used = self._ledger.used(self._clock())
        return tuple(states), tuple(rollout.order() for rollout in self._rollouts.values()), used

    def _live(self, report: RouterReport) -> dict[str, Any]:
        now = self._clock()
        self._routers[report.router] = now, report.snapshot
        self._routers = {
            name: (at, snapshot) for name, (at, snapshot) in self._routers.items() if now - at <= FORGET_AFTER_S
        }
        self._history.add(now, merged({name: snapshot for name, (_, snapshot) in self._routers.items()}))
        return self._history.view()

    def _close_families(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        for family in self._families.values():
            family.close()


@serve.deployment(
    name="Monitor",
    num_replicas=1,
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=2.0,
)
class MonitorDeployment:
    """The monitor as a Serve deployment, one replica, which Serve starts again when it dies."""

    def __init__(self, served: ServeConfig) -> None:
        """`served`: what the service was deployed with; kept for whoever replaces it."""
        speak()
        config, versions = served.monitor, versions_of(served)
        application = serve.get_replica_context().app_name

        def make(old: Version, new: Version) -> Rollout:
            return Rollout(
                old, new, config.directory, lambda version: start_failure(version, application), served.routers
            )

        families = {version.name: str(version.family.directory) for version in versions}
        ledger = None if served.keys_file is None else ledger_path(served.keys_file)
        self._monitor = Monitor(families, config, rollouts=rollouts_of(versions, make), ledger=ledger)
        self._served = served
        self._exporter = Exporter()
        self._told = 0.0

    async def served(self) -> ServeConfig:
        return self._served

    async def rollouts(self) -> list[RolloutView]:
        return await self._monitor.rollouts()

    async def end_rollout(self, name: str, promote: bool) -> str | None:
        """What is wrong with the wish, if anything."""
        try:
            await self._monitor.end_rollout(name, promote)
        except FettleError as error:
            return error.message
        return None

    async def sync(self, report: RouterReport) -> MonitorReply:
        reply = await self._monitor.sync(report)
        now = time.monotonic()
        if now - self._told >= EVERY_S:
            self._told = now
            tell_points(reply.states, self._exporter)
        return reply


def _signature(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
