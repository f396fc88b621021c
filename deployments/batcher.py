"""One variant's queue: reserve a replica slot, then fill it with the rows whose turn it is.

Knows no Ray and no HTTP: slots come from a `Slots` object, and whose turn it is says `fettle.scheduling`. Every row
that was taken in leaves exactly once, with a result, an error or because its client left. An idle system adds no wait,
since a batch is taken the moment a slot is free; under load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from deployments.flights import Flights
from deployments.histogram import SIZES, size_of
from deployments.landed import Answered, Landed
from deployments.slots import CostModel, Slot, SlotLostError, Slots
from deployments.tickets import Leg, Terms, Ticket, exits_of, traces_of
from fettle.errors import DeadlineError, EngineError, FettleError, OverloadedError, UnavailableError
from fettle.rows import Outputs, Row, Rows
from fettle.scheduling import NEVER, Entry, Priority, Queue, Speed, corrected_pace, retry_after_s

logger = logging.getLogger("ray.serve.fettle")

MAX_LOSSES = 5
RESERVE_AGAIN_S = 0.05
# Rows below INTERACTIVE look for a gap this often.
GAP_AGAIN_S = 0.02


@dataclass(slots=True)
class BatcherStats:
    """Counters since the start; `batch_tokens` are padded, `row_tokens` are not; `sizes` of batches by `SIZES`."""

    rows: int = 0
    batches: int = 0
    row_tokens: int = 0
    batch_tokens: int = 0
    refused: int = 0
    late: int = 0
    withdrawn: int = 0
    retried: int = 0
    infer_ms: float = 0.0
    sizes: list[int] = field(default_factory=lambda: [0] * len(SIZES))


def always() -> bool:
    return True


@dataclass(slots=True, eq=False)
class Batcher:
    """See the module. All methods run on one event loop.

    `stages` of the variant. `calm` says whether the rest of the system leaves room for rows below INTERACTIVE.
    """

    slots: Slots
    cost: CostModel
    queue: Queue
    max_queue_s: float
    max_gap_queue_s: float = 60.0
    routers: int = 1
    call_s: float = 0.0
    stages: int = 1
    calm: Callable[[], bool] = always
    stats: BatcherStats = field(default_factory=BatcherStats)
    _pace: float = 1.0
    _last_done: float = 0.0
    _reserving: bool = False
    _singles: set[Ticket] = field(default_factory=set)
    _flights: Flights = field(default_factory=Flights)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _again: asyncio.TimerHandle | None = None

    @property
    def speed(self) -> Speed:
        """By this router's share of the replicas, corrected by what batches were observed to take."""
        return Speed(self._pace, self._share, self.call_s)

    @property
    def _share(self) -> float:
        """Of the replicas, this router's."""
        return max(1, self.slots.replicas) / self.routers

    @property
    def backlog_s(self) -> float:
        """Predicted time until all admitted INTERACTIVE work is done."""
        return self.speed.seconds(self.queue.work_ms())

    @property
    def depth(self) -> int:
        return len(self.queue)

    @property
    def running(self) -> int:
        """Batches under way."""
        return len(self._flights)

    @property
    def is_ready(self) -> bool:
        """Whether there is a replica that takes work."""
        return self.slots.replicas > 0

    def has_room(self, terms: Terms) -> bool:
        """Whether a request would be admitted now; cheap enough to ask before tokenizing."""
        limit_ms = self._limit_s(terms) * 1000 * self._share / self._pace
        return self.queue.has_room(terms.key, terms.weight, limit_ms, terms.priority)

    def _limit_s(self, terms: Terms) -> float:
        return self.max_queue_s if terms.priority is Priority.INTERACTIVE else self.max_gap_queue_s

    def can_meet(self, terms: Terms) -> bool:
        """Whether a request of no size at all could be in time now, as little as that says, before it is tokenized."""
        if terms.deadline == NEVER:
            return True
        nothing = Entry(0, 0.0, terms.arrived, terms.deadline, terms.deadline, terms.key, terms.weight)
        return self.queue.can_promise([nothing], time.monotonic(), self.speed)

    def overloaded(self, terms: Terms) -> OverloadedError:
        """The refusal where there is no room; it says when to come back."""
        self.stats.refused += 1
        limit_s = self._limit_s(terms)
        backlog = self.speed.seconds(self.queue.work_ms(terms.priority))
        wait = retry_after_s(backlog, limit_s)
        return OverloadedError(
            f"the queue holds {backlog:.1f} s of work, the limit is {limit_s:g} s; retry in {wait} s",
            retry_after_s=wait,
        )

    async def answer(self, rows: Sequence[Row], terms: Terms | None = None, leg: Leg | None = None) -> list[Answered]:
        """Queue rows of one request and wait for their answers, in order.

        If the caller is cancelled, or one row fails, the rows that still wait leave the queue.

        Raises:
            DeadlineError: they cannot be in time, or could no more when their turn came.
            EngineError: the engine failed on one of the rows.
            UnavailableError: no replica survived one of them.
        """
        terms = terms or Terms(time.monotonic())
        leg = leg or Leg()
        tickets = [self._ticket(row, terms, leg) for row in rows]
        bound = not leg.admitted and terms.deadline != NEVER
        if bound and not self.queue.can_promise(tickets, time.monotonic(), self.speed):
            self.stats.late += len(tickets)
            raise DeadlineError("no free capacity answers this before its deadline; allow more time or come back later")
        for ticket in tickets:
            ticket.future.add_done_callback(_retrieved)
            self.queue.push(ticket)
        self._reserve_next()
        try:
            if len(tickets) == 1:
                return [await tickets[0].future]
            return list(await asyncio.gather(*(ticket.future for ticket in tickets)))
        finally:
            for ticket in tickets:
                self._withdraw(ticket)

    def _ticket(self, row: Row, terms: Terms, leg: Leg) -> Ticket:
        deadline = terms.deadline - leg.reserve_s
        length = len(row)
        return Ticket(
            length=length,
            cost_ms=self.cost.row_ms(length) * leg.share,
            arrived=terms.arrived,
            entered=time.monotonic(),
            due=min(deadline, terms.arrived + self.max_queue_s),
            deadline=deadline,
            key=terms.key,
            weight=terms.weight,
            priority=terms.priority,
            row=row,
            future=asyncio.get_running_loop().create_future(),
            gates=leg.gates,
            trace=leg.trace,
        )

    def _withdraw(self, ticket: Ticket) -> None:
        ticket.future.cancel()
        if ticket.waiting:
            # What is under way is settled when its batch is back.
            self.stats.withdrawn += 1
            self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        self.queue.settle(ticket)
        self._singles.discard(ticket)

    def _reserve_next(self) -> None:
        """At most one reservation is pending, so that rows stay in the queue, and free to be grouped, till the end."""
        if not len(self.queue) or self._reserving or self._must_wait():
            return
        if not self.queue.waiting(Priority.INTERACTIVE) and self._lowest() is Priority.INTERACTIVE:
            self._look_again()
            return
        self._reserving = True
        task = asyncio.get_running_loop().create_task(self._serve_one_batch())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _lowest(self) -> Priority:
        """Rows below INTERACTIVE go where a replica has nothing to do and the system is calm, and nowhere else."""
        gap = len(self._flights) < self.slots.replicas and self.calm()
        return Priority.SHADOW if gap else Priority.INTERACTIVE

    def _look_again(self) -> None:
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(GAP_AGAIN_S, self._looked)

    def _looked(self) -> None:
        self._again = None
        self._reserve_next()

    def _must_wait(self) -> bool:
        """Whether a suspect row is under way, or waits until nothing is.

        It travels alone, since a batch that waits at the same replica would be lost with it.
        """
        if not self._flights:
            return False
        return any(batch[0].suspect for batch in self._flights.batches) or any(
            ticket.suspect for ticket in self._singles
        )

    async def _serve_one_batch(self) -> None:
        reserving = True
        try:
            async with AsyncExitStack() as reservation:
                slot = await self._reserved(reservation)
                # A batch that waits at a replica hides the time of its call, and needs not be there earlier: till then
                # the rows stay in the queue, where more urgent ones, or those of another key, can still go before them.
                await self._flights.nearly_free(self.speed.replicas, self.call_s)
                reserving = self._reserving = False
                batch = self._take() if slot is not None else []
                self._reserve_next()
                if slot is not None and batch:
                    await self._run(slot, batch)
        except SlotLostError as error:
            logger.warning("a slot was lost as it was given back: %s", error)
        except Exception:
            # Its rows have their error already; those that wait must still be served.
            logger.exception("unexpected error while serving a batch")
            if reserving:
                # As above: not in a tight loop.
                await asyncio.sleep(RESERVE_AGAIN_S)
        finally:
            if reserving:
                self._reserving = False
        self._reserve_next()

    async def _reserved(self, reservation: AsyncExitStack) -> Slot | None:
        try:
            return await reservation.enter_async_context(self.slots.reserve())
        except Exception as error:
            # Whatever it is, nothing was taken for it yet and the rows still wait for a slot; the pause keeps a dead
            # deployment from being asked in a tight loop.
            logger.warning("no slot could be reserved: %r", error, exc_info=not isinstance(error, SlotLostError))
            await asyncio.sleep(RESERVE_AGAIN_S)
            return None

    def _take(self) -> list[Ticket]:
        if self._must_wait():
            return []
        chosen: list[Ticket] = []
        while not chosen and (turn := self._next_in_turn()):
            # A client that has just gone is still listed until its own task has run.
            chosen = [ticket for ticket in turn if not self._is_gone(ticket)]
        if chosen:
            work_ms = sum(ticket.cost_ms for ticket in chosen)
            try:
                self._flights.depart(chosen, work_ms / 1000 * self._pace + self.call_s, self.speed.replicas)
            except Exception:
                self._abandon(chosen)
                raise
        return chosen

    def _is_gone(self, ticket: Ticket) -> bool:
        if not ticket.future.done():
            return False
        self.stats.withdrawn += 1
        self._leave(ticket)
        return True

    def _next_in_turn(self) -> list[Ticket]:
        single = next(iter(self._singles), None)
        if single is not None:
            self._singles.discard(single)
            self.queue.take_one(single)
            return [single]
        taken = self.queue.take(time.monotonic(), self.speed, self._lowest())
        self._refuse_late(taken.late)
        return [ticket for ticket in taken.batch if isinstance(ticket, Ticket)]

    def _refuse_late(self, late: Iterable[Entry]) -> None:
        for ticket in late:
            assert isinstance(ticket, Ticket)
            self.stats.late += 1
            self._fail(ticket, DeadlineError("its turn came too late to be answered before its deadline"))

    async def _run(self, slot: Slot, batch: list[Ticket]) -> None:
        taken, awake = time.monotonic(), self.is_ready
        try:
            rows = Rows.of([ticket.row for ticket in batch])
            outputs = await slot.run(rows, exits_of(batch, self.stages), *traces_of(batch))
        except SlotLostError as error:
            logger.warning("a replica was lost with %d rows: %s", len(batch), error)
            self._flights.land(batch)
            self._lose(batch)
        except EngineError as error:
            self._flights.land(batch)
            self._refuse(batch, error)
        else:
            self._flights.land(batch)
            self._observe(batch, rows, outputs, taken, awake)
            landed = Landed(outputs)
            for index, ticket in enumerate(batch):
                self._leave(ticket)
                if not ticket.future.done():
                    ticket.future.set_result(landed.answer(index, (taken - ticket.entered) * 1000))
        finally:
            self._flights.land(batch)
            self._abandon(batch)

    def _observe(self, batch: list[Ticket], rows: Rows, outputs: Outputs, taken: float, awake: bool) -> None:
        began, self._last_done = max(taken, self._last_done), time.monotonic()
        self.stats.rows += len(batch)
        self.stats.batches += 1
        self.stats.sizes[size_of(len(batch))] += 1
        self.stats.row_tokens += rows.tokens
        self.stats.batch_tokens += rows.longest * len(batch)
        self.stats.infer_ms += outputs.infer_ms
        # What the monitor runs, mostly while nothing else does, says little about a batch among others, and what
        # waited for a start nothing.
        if awake and batch[0].priority is Priority.INTERACTIVE:
            predicted = sum(ticket.cost_ms for ticket in batch)
            self._pace = corrected_pace(self._pace, predicted, self._own_ms(taken, began))

    def _own_ms(self, taken: float, began: float) -> float:
        """What a batch took of the replicas' time, however it was spent: computing, waiting for a core, on the way.

        The time since the batch before it came back, or since it left where that is later, at as many replicas as
        worked: over some batches this adds up to the time in which there was work. The call of a batch that found none
        under way is predicted apart (`Speed.call_s`).
        """
        lanes = min(self.speed.replicas, len(self._flights) + 1)
        call_s = self.call_s if began == taken else 0.0
        return max(0.0, self._last_done - began - call_s) * 1000 * lanes

    def _lose(self, batch: list[Ticket]) -> None:
        for ticket in batch:
            ticket.losses += 1
            if ticket.losses >= MAX_LOSSES:
                self._fail(ticket, UnavailableError(f"no replica could answer after {MAX_LOSSES} attempts"))
        self._put_back(batch)

    def _refuse(self, batch: list[Ticket], error: EngineError) -> None:
        """A batch of one has its answer, an error; of several any one may be at fault, so each tries alone."""
        if len(batch) == 1:
            self._fail(batch[0], error)
        for ticket in batch:
            ticket.alone = True
        self._put_back(batch)

    def _put_back(self, batch: list[Ticket]) -> None:
        """Into the queue, age and deadline kept, unless the row has failed or its client has left."""
        for ticket in batch:
            if ticket.future.done():
                self._leave(ticket)
                continue
            self.stats.retried += 1
            self.queue.push(ticket)
            if ticket.alone or ticket.suspect:
                self._singles.add(ticket)

    def _abandon(self, batch: Iterable[Ticket]) -> None:
        """Whatever happened, cancellation and bugs included, nobody waits for an answer that cannot come."""
        for ticket in batch:
            if not ticket.waiting:
                self._fail(ticket, FettleError("the batch ended without an answer"))

    def _fail(self, ticket: Ticket, error: FettleError) -> None:
        self._leave(ticket)
        if not ticket.future.done():
            ticket.future.set_exception(error)


def _retrieved(future: asyncio.Future[Answered]) -> None:
    """Of several rows that fail one is reported; asyncio need not warn of the others."""
    if not future.cancelled():
        future.exception()
