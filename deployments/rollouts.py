"""The monitor's part of rollouts: adds up what the routers saw of each, decides, and keeps both in a file.

Where a rollout stands is on the disk before any router hears of it, so a monitor that is killed goes on where it was,
and a version that was rolled back stays so. The policy is `fettle.rollout`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

import orjson
from pydantic import ValidationError

from deployments.reports import FORGET_AFTER_S, TrialOrder, TrialReport
from deployments.versions import Version
from fettle.config import RolloutConfig
from fettle.errors import QualityError, UsageError
from fettle.quality import store_path
from fettle.rollout import Findings, Position, Tally, decide, findings, share_of
from fettle.schema import Strict
from fettle.store import sha256_bytes, write_atomic

logger = logging.getLogger("ray.serve.fettle")


class Record(Strict):
    """The file. `id` covers the two versions and the settings; `tallies` by router and step."""

    id: str
    position: Position
    tallies: dict[str, dict[int, Tally]] = {}


class RolloutView(Strict):
    """For `fettle rollout status`."""

    family: str
    old: str
    new: str
    name: str
    path: str
    same_reference: bool
    share: float
    position: Position
    tallies: dict[int, Tally]
    findings: Findings
    config: RolloutConfig


class Rollout:
    """One family's. All methods run on one thread."""

    def __init__(
        self,
        old: Version,
        new: Version,
        directory: str | None,
        failure: Callable[[Version], str | None] = lambda _: None,
        routers: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`directory`: `monitor.directory`; `failure`: what Ray says of replicas of a version that do not start;
        `routers`: how many have to be ready before it begins.

        Raises:
            QualityError: the file cannot be read or written.
        """
        assert old.settings.rollout is not None
        self.old, self.new, self.config = old, new, old.settings.rollout
        self._failure, self._routers, self._clock = failure, routers, clock
        self._path = store_path(old.family.directory, old.name, directory).with_suffix(".rollout.json")
        self._same_reference = old.family.manifest.source.sha256 == new.family.manifest.source.sha256
        self._ready: dict[str, tuple[float, bool]] = {}
        self._compares = True
        parts = f"{old.family.version} {new.family.version} {self.config.model_dump_json()}"
        self._record = self._read(sha256_bytes(parts.encode())[:16])
        self._write(self._record)

    @property
    def position(self) -> Position:
        return self._record.position

    def take(self, router: str, report: TrialReport) -> None:
        """Add what a router saw; a report that comes twice counts once, since it holds totals."""
        now = self._clock()
        self._ready[router] = now, report.ready
        self._ready = {each: (at, ready) for each, (at, ready) in self._ready.items() if now - at <= FORGET_AFTER_S}
        self._compares = report.compares
        tallies = {**self._record.tallies, router: report.tallies} if report.tallies else self._record.tallies
        failure = self._failure(self.new) if self.position.status == "starting" else None
        position = decide(
            self.position,
            _by_step(tallies.values()),
            now,
            self.config,
            same_reference=self._same_reference,
            compares=self._compares,
            ready=len(self._ready) >= self._routers and all(ready for _, ready in self._ready.values()),
            failure=failure,
        )
        self._keep(Record(id=self._record.id, position=position, tallies=tallies))

    def end(self, promote: bool) -> None:
        """By hand. Raises UsageError if it is over."""
        if self.position.over:
            raise UsageError(f"the rollout of {self.new.name} is over: {self.position.status}, {self.position.reason}")
        status = "promoted" if promote else "rolled back"
        position = self.position.model_copy(update={"status": status, "since": self._clock(), "reason": "by hand"})
        self._keep(self._record.model_copy(update={"position": position}))

    def order(self) -> TrialOrder:
        position = self.position
        share = share_of(position, self.config)
        return TrialOrder(self.new.name, share, position.step, position.status, position.reason)

    def view(self) -> RolloutView:
        tallies = _by_step(self._record.tallies.values())
        return RolloutView(
            family=self.old.name,
            old=self.old.family.version,
            new=self.new.family.version,
            name=self.new.name,
            path=self.config.path,
            same_reference=self._same_reference,
            share=share_of(self.position, self.config),
            position=self.position,
            tallies=tallies,
            findings=findings(tallies, self.config, same_reference=self._same_reference),
            config=self.config,
        )

    def _keep(self, record: Record) -> None:
        if record == self._record:
            return
        self._write(record)
        if record.position != self._record.position:
            logger.warning(
                "rollout of %s: %s, step %d; %s",
                self.new.name,
                record.position.status,
                record.position.step,
                record.position.reason or "going on",
            )
        self._record = record

    def _read(self, identity: str) -> Record:
        fresh = Record(id=identity, position=Position(since=self._clock()))
        try:
            found = Record.model_validate(orjson.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError, ValidationError) as error:
            raise QualityError(f"{self._path}: cannot be read ({error}); move it away to begin anew") from None
        return found if found.id == identity else fresh

    def _write(self, record: Record) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, orjson.dumps(record.model_dump(mode="json"), option=orjson.OPT_NON_STR_KEYS))
        except OSError as error:
            raise QualityError(
                f"{self._path}: the state of a rollout cannot be kept there ({error.strerror}); give "
                "monitor.directory a directory that can be written"
            ) from error


def rollouts_of(versions: Iterable[Version], make: Callable[[Version, Version], Rollout]) -> dict[str, Rollout]:
    """By the name of the new version."""
    known = {version.name: version for version in versions}
    return {
        version.name: make(known[version.stable], version) for version in known.values() if version.stable is not None
    }


def _by_step(routers: Iterable[Mapping[int, Tally]]) -> dict[int, Tally]:
    found: dict[int, Tally] = {}
    for tallies in routers:
        for step, tally in tallies.items():
            found[step] = found.get(step, Tally()) + tally
    return found
