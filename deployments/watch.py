"""The router's part of the monitor: which rows are also answered by the reference, and the reports to the monitor.

Rows are drawn before routing, compared later at SHADOW priority, and reported once a second; the answer says which
points are revoked and what all routers together are doing. Without a monitor (`send` None) nothing is drawn. A report
that does not arrive is sent again; a router that is killed loses the pairs that it has not reported, which favours no
outcome.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from deployments.reports import MonitorReply, RouterReport, TrialOrder, TrialReport
from deployments.served import Quality, ServedFamily
from deployments.telemetry import Telemetry
from deployments.tickets import Terms
from deployments.walk import Walked, walk
from fettle import gearbox
from fettle.answers import Floats, disagreements
from fettle.drift import score_bins
from fettle.errors import FettleError
from fettle.manifest import Head
from fettle.menu import Way
from fettle.quality import Pair, Places, PointState
from fettle.rows import Row
from fettle.scheduling import Priority
from fettle.usage import Usage

logger = logging.getLogger("ray.serve.fettle")

REPORT_EVERY_S = 1.0
REPLY_WITHIN_S = 5.0
# Requests of a class wait so long for the first word of what is revoked, when a router starts.
INFORMED_WITHIN_S = 10.0
# Rows that wait for their comparison, a few kB each. Under a load that leaves no gap for very long, further draws are
# given up, whatever their answers are.
MOST_PENDING = 2_000
MOST_PAIRS_REPORTED = 2_000

Send = Callable[[RouterReport], Awaitable[MonitorReply]]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Comparison(Generic[Answer]):
    """An answer that was given, how to have another way answer the same, and when two answers differ."""

    answer: Answer
    ask: Callable[[Way, Terms], Awaitable[Answer]]
    differs: Callable[[Answer, Answer], bool]


class Trialled(Protocol):
    """A rollout's part at this router (`deployments.trial`)."""

    def report(self) -> TrialReport: ...

    def obey(self, order: TrialOrder) -> None: ...


@dataclass(slots=True, eq=False)
class Seen:
    """What a point answered since the last report: rows by [step][stage], and their scores."""

    family: str
    point: str
    answered: list[list[int]]
    scores: list[float] = field(default_factory=list)


class Watch:
    """See the module. All methods run on one event loop."""

    def __init__(
        self,
        router: str = "",
        families: Mapping[str, ServedFamily] | None = None,
        telemetry: Telemetry | None = None,
        send: Send | None = None,
        share: float = 0.0,
        seed: int | None = None,
        trials: Collection[Trialled] = (),
        usage: Usage | None = None,
    ) -> None:
        self.states: tuple[PointState, ...] = ()
        self.live: dict[str, Any] = {}
        self._router = router
        self._families = families or {}
        self._telemetry = telemetry or Telemetry()
        self._send = send
        self._usage = usage or Usage()
        self._trials = {trial.report().name: trial for trial in trials}
        self.share = share if send is not None else 0.0
        self._chance = random.Random(seed)
        self._pairs: list[Pair] = []
        self._seen: dict[tuple[str, str], Seen] = {}
        self._comparing: set[asyncio.Task[None]] = set()
        self._informed = asyncio.Event()
        self._heard = time.monotonic()
        if send is None:
            self._informed.set()

    @property
    def silent_s(self) -> float:
        """Since the monitor was last heard; 0 without one."""
        return 0.0 if self._send is None else time.monotonic() - self._heard

    def draw(self, rows: int) -> list[int]:
        """Which of a request's rows will be compared, each by chance alone."""
        if not self.share:
            return []
        return [row for row in range(rows) if self._chance.random() < self.share]

    async def informed(self) -> None:
        """Wait, when this router has just started, until it knows what is revoked."""
        if not self._informed.is_set():
            await self._informed.wait()

    def saw(
        self, family: ServedFamily, quality: Quality, way: Way, walked: Walked, rows: Sequence[Row], sample: list[int]
    ) -> None:
        """Note a request's answers, and compare the drawn rows later."""
        for visits in walked.visits:
            last = visits[-1]
            self.note(family, way, len(visits) - 1, last.answered.stage, last.score)
        if family.task.head is Head.REGRESSION:
            # How far two numbers may differ is relative to the spread of all of the reference's, which the family does
            # not record.
            return

        def differs(values: Floats, truth: Floats) -> bool:
            return bool(disagreements(values, truth, family.task, family.family.manifest.cosine_floor)[0])

        for row in sample:

            async def ask(other: Way, terms: Terms, row: Row = rows[row]) -> Floats:
                return (await walk(family, other, [row], terms)).values

            self.compare_later(family, quality, way, Comparison(walked.values[row][None], ask, differs))

    def note(self, family: ServedFamily, way: Way, step: int, stage: int, score: float) -> None:
        """Count where a row was answered, if by a point: drift shows there first."""
        if self._send is None or way.point is None:
            return
        seen = self._seen.get((family.name, way.fingerprint))
        if seen is None:
            empty = [[0] * len(stretch.step.gates) for stretch in way.stretches]
            seen = self._seen[family.name, way.fingerprint] = Seen(family.name, way.name, empty)
        seen.answered[step][stage] += 1
        seen.scores.append(score)

    def compare_later(self, family: ServedFamily, quality: Quality, way: Way, comparison: Comparison[Any]) -> None:
        """Compare an answer that was drawn with the reference's, when there is room for it."""
        if self._send is None or quality.variant is not None or family.reference is None:
            # A pinned variant promises nothing.
            return
        revoked = [each for each in family.menu.revoked if each.alpha <= quality.tolerance]
        if (way.point is None and not revoked) or len(self._comparing) >= MOST_PENDING:
            return
        task = asyncio.get_running_loop().create_task(self._compare(family, way, comparison, revoked))
        self._comparing.add(task)
        task.add_done_callback(self._comparing.discard)

    async def run(self) -> None:
        """Shift gears and report, until cancelled."""
        reporting = asyncio.get_running_loop().create_task(self._report_forever())
        try:
            while True:
                now = time.monotonic()
                for family in self._families.values():
                    family.gearbox.tick(now)
                await asyncio.sleep(gearbox.EVERY_S)
        finally:
            reporting.cancel()

    def snapshot(self) -> dict[str, Any]:
        """This router's telemetry now."""
        return self._telemetry.snapshot([family.gauges() for family in self._families.values()])

    async def report(self) -> None:
        """One report, and what is learnt from the reply.

        Raises:
            Whatever `send` does; what was to be reported is then kept for the next time.
        """
        if self._send is None:
            return
        pairs, seen = self._pairs[:MOST_PAIRS_REPORTED], self._seen
        self._seen = {}
        places = tuple(
            Places(each.family, each.point, key, tuple(map(tuple, each.answered)), tuple(score_bins(each.scores)))
            for (_, key), each in seen.items()
        )
        # The pairs stay until they are known to have arrived; twice does no harm, since each has a name.
        try:
            trials = tuple(trial.report() for trial in self._trials.values())
            usage = self._usage.lines()
            reply = await self._send(RouterReport(self._router, tuple(pairs), places, self.snapshot(), trials, usage))
        except BaseException:  # a reply that comes too late among them, which cancels
            self._unsee(seen)
            raise
        self._heard = time.monotonic()
        del self._pairs[: len(pairs)]
        self.live = reply.live
        self._usage.learn(usage, reply.used, time.time())
        for order in reply.orders:
            if order.name in self._trials:
                self._trials[order.name].obey(order)
        self._learn(reply.states)

    def _learn(self, states: tuple[PointState, ...]) -> None:
        self.states = states
        for family in self._families.values():
            family.learn(states)
        self._informed.set()

    async def _report_forever(self) -> None:
        started = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(REPLY_WITHIN_S):
                    await self.report()
            except Exception as error:
                # The monitor may be starting again. What is revoked stays so, and what was not reported will be.
                logger.warning("the monitor does not answer: %r", error)
                if time.monotonic() - started > INFORMED_WITHIN_S:
                    self._informed.set()
            await asyncio.sleep(REPORT_EVERY_S)

    def _unsee(self, seen: dict[tuple[str, str], Seen]) -> None:
        """Put back what did not arrive; it is counted again where only the reply was lost, which no test minds."""
        for key, old in seen.items():
            new = self._seen.setdefault(key, old)
            if new is not old:
                new.answered = [
                    [a + b for a, b in zip(*steps, strict=True)]
                    for steps in zip(new.answered, old.answered, strict=True)
                ]
                new.scores += old.scores

    async def _compare(
        self, family: ServedFamily, way: Way, comparison: Comparison[Any], revoked: Collection[Way]
    ) -> None:
        """Ask the reference, and whichever revoked points the class would have: pairs for a new certificate."""
        terms, differs = Terms(time.monotonic(), priority=Priority.SHADOW), comparison.differs
        try:
            truth = comparison.answer
            if way.point is not None:
                truth = await comparison.ask(family.menu.reference(), terms)
                self._pair(family, way, differs(comparison.answer, truth), served=True)
            for other in revoked:
                if other.fingerprint != way.fingerprint:
                    again = await comparison.ask(other, terms)
                    self._pair(family, other, differs(again, truth), served=False)
        except FettleError as error:
            logger.warning("a row could not be compared with the reference: %s", error)

    def _pair(self, family: ServedFamily, way: Way, differs: bool, *, served: bool) -> None:
        self._pairs.append(
            Pair(
                id=uuid.uuid4().hex,
                family=family.name,
                point=way.name,
                fingerprint=way.fingerprint,
                differs=differs,
                served=served,
                at=time.time(),
            )
        )
