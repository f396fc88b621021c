"""The router's part of a rollout: which requests the new version answers, and what is counted about both versions.

The share is an order of the monitor, which decides (`fettle.rollout`). A request goes to one version as a whole, and
all requests of a session to the same one. What the new version cannot take, or fails at, the old one answers, so that a
bad version costs its clients time and no answer. Drawn rows are answered by the old version's reference as well, later.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.reports import TrialOrder, TrialReport
from deployments.served import ServedFamily
from deployments.tickets import Terms
from deployments.walk import Walked, walk
from deployments.watch import Comparison
from fettle.answers import Floats, disagreements
from fettle.config import RolloutConfig
from fettle.errors import FettleError
from fettle.menu import Way
from fettle.rollout import EXACT_LEVEL, Compared, Side, Tally, comparable
from fettle.rows import Row
from fettle.scheduling import Priority

logger = logging.getLogger("ray.serve.fettle")

# The old version's latest requests, whose 90th percentile is the measure of slowness, and how many it takes.
RECENT = 500
FEWEST = 50
MOST_PENDING = 500


class RecentTimes:
    """The 90th percentile of the latest times."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, ms: float) -> None:
        self._latest.append(ms)
        insort(self._sorted, ms)
        if len(self._latest) > RECENT:
            self._sorted.remove(self._latest.popleft())

    @property
    def p90(self) -> float | None:
        """None where too few were seen."""
        count = len(self._sorted)
        return self._sorted[int(0.9 * count)] if count >= FEWEST else None


@dataclass(slots=True, eq=False)
class Trial:
    """See the module. One rollout at one router; all methods run on one event loop."""

    old: ServedFamily
    new: ServedFamily
    config: RolloutConfig
    share: float = 0.0
    step: int = 0
    chance: random.Random = field(default_factory=random.Random)
    tallies: dict[int, Tally] = field(default_factory=dict)
    _times: RecentTimes = field(default_factory=RecentTimes)
    _comparing: set[asyncio.Task[None]] = field(default_factory=set)

    def obey(self, order: TrialOrder) -> None:
        """Take over what the monitor decided."""
        if order.share != self.share:
            logger.warning("rollout of %s: its share of the requests is %g now", self.new.name, order.share)
        self.share, self.step = order.share, order.step

    def report(self) -> TrialReport:
        """All that was counted since this router started."""
        return TrialReport(self.new.name, self._is_ready, self._comparable, dict(self.tallies))

    def draw(self, session: str | None) -> bool:
        """Whether the new version is to answer; a session stays where it is while the share grows."""
        if session is None:
            return self.chance.random() < self.share
        digest = hashlib.blake2b(f"{self.new.name} {session}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.share * 2**64

    def answered(self, family: ServedFamily, ms: float) -> None:
        """Count an answer that took so long.

        Slow is at the old version what takes longer than its own 90th percentile, and at the new one what takes longer
        than that times `slower`: equally often, if the new one's times are at most `slower` times the old one's.
        """
        limit = self._times.p90
        if family is self.new:
            self._count(new=Side(requests=1, slow=int(limit is not None and ms > limit * self.config.slower)))
        else:
            self._count(old=Side(requests=1, slow=int(limit is not None and ms > limit)))
            self._times.add(ms)

    def failed(self, family: ServedFamily) -> None:
        side = Side(requests=1, failed=1)
        if family is self.new:
            self._count(new=side)
        else:
            self._count(old=side)

    def sample(self, rows: int) -> list[int]:
        """Which of the new version's rows will be compared, each by chance alone."""
        if not self._comparable:
            return []
        return [row for row in range(rows) if self.chance.random() < self.config.shadow]

    def saw(self, way: Way, walked: Walked, rows: Sequence[Row], sample: Sequence[int]) -> None:
        """Compare the new version's drawn answers, later."""
        task, floor = self.old.task, self.old.family.manifest.cosine_floor

        def differs(values: Floats, truth: Floats) -> bool:
            return bool(disagreements(values, truth, task, floor)[0])

        for row in sample:

            async def ask(other: Way, terms: Terms, row: Row = rows[row]) -> Floats:
                return (await walk(self.old, other, [row], terms)).values

            self.compare_later(way, Comparison(walked.values[row][None], ask, differs))

    def compare_later(self, way: Way, comparison: Comparison[Any]) -> None:
        """`comparison.ask` asks the old version."""
        if len(self._comparing) < MOST_PENDING:
            task = asyncio.get_running_loop().create_task(self._compare(way, comparison))
            self._comparing.add(task)
            task.add_done_callback(self._comparing.discard)

    @property
    def _is_ready(self) -> bool:
        return all(batcher.is_ready for batcher in self.new.batchers.values())

    @property
    def _comparable(self) -> bool:
        return self.old.reference is not None and comparable(self.old.family.manifest, self.new.family.manifest)

    async def _compare(self, way: Way, comparison: Comparison[Any]) -> None:
        step = self.step
        try:
            terms = Terms(time.monotonic(), priority=Priority.SHADOW)
            truth = await comparison.ask(self.old.menu.reference(), terms)
        except FettleError as error:
            logger.warning("an answer of %s could not be compared: %s", self.new.name, error)
            return
        one = Compared(rows=1, differing=int(comparison.differs(comparison.answer, truth)))
        # Without a promise nothing is broken, but the versions may still be compared.
        promised = {} if way.bound is None else {max(way.alpha, EXACT_LEVEL): one}
        self.tallies[step] = self.tallies.get(step, Tally()) + Tally(compared=one, promised=promised)

    def _count(self, old: Side | None = None, new: Side | None = None) -> None:
        if 0 < self.share < 1:
            seen = Tally(old=old or Side(), new=new or Side())
            self.tallies[self.step] = self.tallies.get(self.step, Tally()) + seen
