"""One text variant's queue: calls wait here until a replica has slots for them, and come back as bits of text.

Has what the router asks of a `Batcher` (room, time, backlog), so that gears and admission are the same for both. Knows
no Ray and no HTTP. A call whose replica dies goes on at another one after the tokens that were told; nobody sees more
than a pause.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from deployments.batcher import MAX_LOSSES, Batcher, BatcherStats, always
from deployments.histogram import size_of
from deployments.slots import SlotLostError
from deployments.text_work import Bit, TextWork
from deployments.tickets import Terms
from fettle.errors import DeadlineError, OverloadedError, UnavailableError
from fettle.latency import TextCosts
from fettle.scheduling import NEVER, BatchBounds, Entry, Priority, Queue, Speed, corrected_pace, retry_after_s

logger = logging.getLogger("ray.serve.fettle")

# Tokens that a text is expected to have, before any was seen.
FIRST_GUESS = 64.0
WEIGHT = 0.05
# Before another attempt, by how many there were: a replica takes some seconds to come back where it was the only one.
PAUSES_S = (0.0, 0.5, 2.0, 8.0)
# One call at a time leaves the queue, whatever its size.
ONE_BY_ONE = BatchBounds(rows=1, tokens=1, max_age_s=0.0)


class Replicas(Protocol):
    """Where calls go; `replicas` are running now."""

    @property
    def replicas(self) -> int: ...

    def generate(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        """The work's bits. Raises SlotLostError if the replica is gone."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Turn(Entry):
    """A call that waits for its turn; `size` is how many slots it takes."""

    size: int
    came: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class Lane:
    """See the module. All methods run on one event loop.

    `places` is how many generations one replica takes, those that wait there included, of this router's share.
    """

    slots: Replicas
    costs: TextCosts
    places: int
    max_queue_s: float
    max_gap_queue_s: float = 60.0
    routers: int = 1
    call_s: float = 0.0
    stages: int = 1
    calm: Callable[[], bool] = always
    stats: BatcherStats = field(default_factory=BatcherStats)
    queue: Queue = field(default_factory=lambda: Queue(ONE_BY_ONE))
    _pace: float = 1.0
    _taken: int = 0
    _running_ms: float = 0.0
    _expected: float = FIRST_GUESS

    @property
    def speed(self) -> Speed:
        return Speed(self._pace, max(1, self.slots.replicas) / self.routers, self.call_s)

    @property
    def backlog_s(self) -> float:
        """Predicted time until all that waits is under way: texts that run leave their slots one by one."""
        return self.speed.seconds(max(0.0, self.queue.work_ms() - self._running_ms))

    @property
    def depth(self) -> int:
        return len(self.queue)

    @property
    def running(self) -> int:
        """Slots that are taken, those that wait at a replica included."""
        return self._taken

    @property
    def is_ready(self) -> bool:
        return self.slots.replicas > 0

    @property
    def capacity(self) -> int:
        """Generations under way, at most; at least one, so that a deployment that was scaled to zero comes back."""
        return max(1, self.slots.replicas * self.places // self.routers)

    def has_room(self, terms: Terms) -> bool:
        limit_ms = self._running_ms + self._limit_s(terms) * 1000 * self.speed.replicas / self._pace
        return self.queue.has_room(terms.key, terms.weight, limit_ms, terms.priority)

    def can_meet(self, terms: Terms) -> bool:
        """Whether a text could begin before the deadline."""
        return terms.deadline == NEVER or time.monotonic() + self._wait_s() < terms.deadline

    def overloaded(self, terms: Terms) -> OverloadedError:
        """The refusal where there is no room; it says when to come back."""
        self.stats.refused += 1
        limit_s = self._limit_s(terms)
        backlog = self.backlog_s
        wait = retry_after_s(backlog, limit_s)
        return OverloadedError(
            f"the queue holds {backlog:.1f} s of work, the limit is {limit_s:g} s; retry in {wait} s",
            retry_after_s=wait,
        )

    async def generate(
        self, work: TextWork, terms: Terms, *, admitted: bool = False, begun: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[list[Bit], None]:
        """Wait for a turn, then the work's bits. Closing the generator frees its slots within a step.

        Args:
            admitted: the call is under way already, at an earlier step, and is not asked again whether it fits.
            begun: called when its turn has come.

        Raises:
            DeadlineError: it cannot be, or was not, answered in time.
            UnavailableError: no replica survived it.
        """
        turn = self._turn(work, terms)
        if not admitted and terms.deadline != NEVER:
            self._check_time(work, terms)
        self.queue.push(turn)
        try:
            await self._wait(turn, terms)
            begun()
            started, tokens, awake = time.monotonic(), 0, self.is_ready
            async with aclosing(self._whole(work, terms)) as whole:
                async for bits in whole:
                    tokens += sum(len(bit.tokens) for bit in bits)
                    yield bits
            self._observe(turn, work, tokens, time.monotonic() - started, awake)
        finally:
            self._leave(turn)

    def _turn(self, work: TextWork, terms: Terms) -> Turn:
        return Turn(
            length=1,
            cost_ms=self.predicted_ms(work),
            arrived=terms.arrived,
            due=min(terms.deadline, terms.arrived + self.max_queue_s),
            # The queue would drop who is late in silence; `_wait` tells them.
            deadline=NEVER,
            key=terms.key,
            weight=terms.weight,
            priority=terms.priority,
            size=min(len(work.numbers), self.places),
        )

    def predicted_ms(self, work: TextWork) -> float:
        """What the work takes of one replica whose slots are full, before the pace corrects it."""
        tokens = sum(min(self._expected, limit) for limit in work.max_tokens) * work.choices
        prompts = sum(self.costs.prompt_ms(len(ids)) for ids in work.prompts)
        return max(1e-3, prompts + tokens * self.costs.token_ms)

    def _check_time(self, work: TextWork, terms: Terms) -> None:
        longest = max(len(ids) for ids in work.prompts)
        least_s = (self.costs.prompt_ms(longest) + min(work.max_tokens[0], self._expected) * self.costs.step_ms) / 1000
        if time.monotonic() + self._wait_s() + self._pace * least_s > terms.deadline:
            self.stats.late += 1
            raise DeadlineError("no free capacity answers this before its deadline; allow more time or come back later")

    def _wait_s(self) -> float:
        """Until a text that comes now can begin."""
        return 0.0 if self._taken < self.capacity and not len(self.queue) else self.backlog_s

    async def _wait(self, turn: Turn, terms: Terms) -> None:
        self._next()
        try:
            async with _by(terms.deadline):
                await turn.came.wait()
        except TimeoutError:
            self.stats.late += 1
            raise DeadlineError("its turn came too late to be answered before its deadline") from None

    def _next(self) -> None:
        """Give free slots to whose turn it is."""
        while len(self.queue) and (not self._taken or self._taken < self.capacity):
            # Rows below INTERACTIVE go where there is nothing else to do, and nowhere else.
            lowest = Priority.SHADOW if not self._taken or self.calm() else Priority.INTERACTIVE
            batch = self.queue.take(time.monotonic(), self.speed, lowest).batch
            if not batch:
                return
            for turn in batch:
                assert isinstance(turn, Turn)
                self._taken += turn.size
                self._running_ms += turn.cost_ms
                turn.came.set()

    def _leave(self, turn: Turn) -> None:
        if turn.came.is_set():
            self._taken -= turn.size
            self._running_ms = max(0.0, self._running_ms - turn.cost_ms)
        elif turn.waiting:
            self.stats.withdrawn += 1
        self.queue.settle(turn)
        self._next()

    async def _whole(self, work: TextWork, terms: Terms) -> AsyncGenerator[list[Bit], None]:
        """The bits of the work, from as many replicas as it takes."""
        told = _Told(work)
        for attempt in range(MAX_LOSSES):
            stream = self.slots.generate(told.rest())
            try:
                while told.left:
                    async with _by(terms.deadline):
                        bits = await anext(stream)
                    told.add(bits)
                    yield bits
                return
            except TimeoutError:
                self.stats.late += 1
                raise DeadlineError("not answered before its deadline; allow more time or come back later") from None
            except (SlotLostError, StopAsyncIteration) as error:
                logger.warning("a replica was lost with a text under way: %r", error)
                self.stats.retried += 1
            finally:
                await stream.aclose()
            if attempt < len(PAUSES_S):
                # Not beyond the deadline, which then says so.
                await asyncio.sleep(max(0.0, min(PAUSES_S[attempt], terms.deadline - time.monotonic())))
        raise UnavailableError(f"no replica could answer after {MAX_LOSSES} attempts")

    def _limit_s(self, terms: Terms) -> float:
        return self.max_queue_s if terms.priority is Priority.INTERACTIVE else self.max_gap_queue_s

    def _observe(self, turn: Turn, work: TextWork, tokens: int, seconds: float, awake: bool) -> None:
        choices = len(work.numbers)
        self.stats.rows += choices
        self.stats.batches += 1
        self.stats.sizes[size_of(choices)] += 1
        self.stats.row_tokens += tokens
        self.stats.infer_ms += 1000 * seconds
        self._expected += WEIGHT * (tokens / choices - self._expected)
        if not awake:
            # It waited for a replica to start.
            return
        # Full slots do `capacity` texts at a time, so each has that part of the machine.
        lanes = max(1, self._taken)
        self._pace = corrected_pace(self._pace, turn.cost_ms * lanes / turn.size, 1000 * seconds, WEIGHT)


# What waits for one variant, of either kind.
Queued: TypeAlias = Batcher | Lane


class _Told:
    """What a call's replicas have told so far."""

    def __init__(self, work: TextWork) -> None:
        self._work = work
        self._tokens: dict[int, list[int]] = {}
        self._over: set[int] = set()
        self._prompts = False

    @property
    def left(self) -> bool:
        return len(self._over) < len(self._work.answers)

    def add(self, bits: Sequence[Bit]) -> None:
        for bit in bits:
            self._tokens.setdefault(bit.choice, []).extend(token.id for token in bit.tokens)
            self._prompts = self._prompts or bit.prompt is not None
            if bit.over:
                self._over.add(bit.choice)

    def rest(self) -> TextWork:
        """What another replica has to do: all of a vote, which tells nothing before its end."""
        if self._work.vote is not None or not self._tokens:
            return self._work
        left = tuple(number for number in self._work.numbers if number not in self._over)
        given = {number: tuple(self._tokens.get(number, ())) for number in left}
        return replace(
            self._work, only=left, given=given, prompt_logprobs=self._work.prompt_logprobs and not self._prompts
        )


def _by(deadline: float) -> asyncio.Timeout:
    return asyncio.timeout(None if deadline == NEVER else max(0.0, deadline - time.monotonic()))
