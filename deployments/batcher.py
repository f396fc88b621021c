"""One variant's queue: reserve a replica slot, then fill it with the rows that go well together.

Knows no Ray and no HTTP: slots come from a `Slots` object. Every row that was taken in leaves exactly once, with
a result, an error or because its client left. An idle system adds no wait, since a batch is taken the moment a slot
is free; under load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fettle import policy
from fettle.errors import EngineError, FettleError, OverloadedError, UnavailableError
from fettle.policy import BatchBounds
from fettle.rows import Outputs, Row, Rows

logger = logging.getLogger("ray.serve")

MAX_LOSSES = 5
# A row lost this often may be the one that kills replicas. It then travels alone, and nothing else is under way
# meanwhile, since a batch that waits at the same replica would be lost with it.
SUSPECT_FROM = 3
RESERVE_AGAIN_S = 0.05


class SlotLostError(Exception):
    """The replica died or went away before it answered. The rows are intact and can go to another."""


class Slot(Protocol):
    async def run(self, rows: Rows) -> Outputs:
        """Raises SlotLostError if the replica is gone, EngineError if it failed on these rows."""
        ...


class Slots(Protocol):
    """Where batches go: each reservation waits for a free place at some replica. `replicas` are running now."""

    @property
    def replicas(self) -> int: ...

    def reserve(self) -> AbstractAsyncContextManager[Slot]: ...


class CostModel(Protocol):
    """Predicted milliseconds of one row of `length` tokens in a well-filled batch."""

    def row_ms(self, length: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Answered:
    """A row's values float32 [width], and where its time went."""

    values: NDArray[np.float32]
    queue_ms: float
    infer_ms: float
    batch_rows: int


@dataclass(slots=True, eq=False)
class Ticket:
    """A row in the queue or on its way; `cost_ms` is what the latency table predicts for it."""

    row: Row
    cost_ms: float
    arrived: float
    future: asyncio.Future[Answered]
    losses: int = 0
    alone: bool = False

    @property
    def suspect(self) -> bool:
        return self.losses >= SUSPECT_FROM


@dataclass(slots=True)
class BatcherStats:
    """Counters since the start; `batch_tokens` are padded, `row_tokens` are not."""

    rows: int = 0
    batches: int = 0
    row_tokens: int = 0
    batch_tokens: int = 0
    refused: int = 0
    withdrawn: int = 0
    retried: int = 0
    infer_ms: float = 0.0


@dataclass(slots=True, eq=False)
class Batcher:
    """See the module. All methods run on one event loop."""

    slots: Slots
    cost: CostModel
    bounds: BatchBounds
    max_queue_s: float
    routers: int = 1
    stats: BatcherStats = field(default_factory=BatcherStats)
    _waiting: dict[int, Ticket] = field(default_factory=dict)
    _work_ms: float = 0.0
    _pace: float = 1.0
    _reserving: bool = False
    _under_way: list[list[Ticket]] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def backlog_s(self) -> float:
        """Predicted time until all that was admitted is done, by this router's share of the replicas."""
        return policy.drain_s(self._work_ms, self._pace, max(1, self.slots.replicas) / self.routers)

    @property
    def depth(self) -> int:
        return len(self._waiting)

    def check_room(self) -> None:
        """Raises OverloadedError if a request would be refused now; cheap enough to ask before tokenizing."""
        backlog = self.backlog_s
        if not policy.admits(backlog, self.max_queue_s):
            self.stats.refused += 1
            wait = policy.retry_after_s(backlog, self.max_queue_s)
            raise OverloadedError(
                f"the queue holds {backlog:.1f} s of work, the limit is {self.max_queue_s:g} s; retry in {wait} s",
                retry_after_s=wait,
            )

    async def answer(self, rows: Sequence[Row]) -> list[Answered]:
        """Queue all rows of one request and wait for their answers, in order.

        If the caller is cancelled, or one row fails, the rows that still wait leave the queue.

        Raises:
            EngineError: the engine failed on one of the rows.
            UnavailableError: no replica survived one of them.
        """
        tickets = [self._admit(row) for row in rows]
        self._reserve_next()
        try:
            return list(await asyncio.gather(*(ticket.future for ticket in tickets)))
        finally:
            for ticket in tickets:
                self._withdraw(ticket)

    @property
    def is_ready(self) -> bool:
        """Whether there is a replica that takes work."""
        return self.slots.replicas > 0

    def _admit(self, row: Row) -> Ticket:
        ticket = Ticket(row, self.cost.row_ms(len(row)), time.monotonic(), asyncio.get_running_loop().create_future())
        self._work_ms += ticket.cost_ms
        ticket.future.add_done_callback(lambda _: self._settle(ticket))
        self._waiting[id(ticket)] = ticket
        return ticket

    def _settle(self, ticket: Ticket) -> None:
        self._work_ms = max(0.0, self._work_ms - ticket.cost_ms)

    def _withdraw(self, ticket: Ticket) -> None:
        if self._waiting.pop(id(ticket), None) is not None:
            self.stats.withdrawn += 1
        ticket.future.cancel()

    def _reserve_next(self) -> None:
        """At most one reservation is pending, so that rows stay in the queue, and free to be grouped, till the end."""
        if self._waiting and not self._reserving and not self._must_wait():
            self._reserving = True
            task = asyncio.get_running_loop().create_task(self._serve_one_batch())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _must_wait(self) -> bool:
        """Whether a suspect row is under way, or waits until nothing is."""
        if not self._under_way:
            return False
        return any(batch[0].suspect for batch in self._under_way) or any(
            ticket.suspect for ticket in self._waiting.values()
        )

    async def _serve_one_batch(self) -> None:
        try:
            async with AsyncExitStack() as reservation:
                slot = await self._reserved(reservation)
                self._reserving = False
                batch = self._take() if slot is not None else []
                self._reserve_next()
                if slot is not None and batch:
                    await self._run(slot, batch)
        except SlotLostError as error:
            logger.warning("a slot was lost as it was given back: %s", error)
        except Exception:
            # Its rows have their error already; those that wait must still be served.
            logger.exception("unexpected error while serving a batch")
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
        now = time.monotonic()
        # A client that has just gone is still listed until its own task has run.
        waiting = [ticket for ticket in self._waiting.values() if not ticket.future.done()]
        single = next((ticket for ticket in waiting if ticket.suspect or ticket.alone), None)
        if single is not None:
            chosen = [single]
        else:
            lengths = [len(ticket.row) for ticket in waiting]
            ages = [now - ticket.arrived for ticket in waiting]
            chosen = [waiting[index] for index in policy.choose_batch(lengths, ages, self.bounds)]
        for ticket in chosen:
            del self._waiting[id(ticket)]
        if chosen:
            self._under_way.append(chosen)
        return chosen

    async def _run(self, slot: Slot, batch: list[Ticket]) -> None:
        taken = time.monotonic()
        rows = Rows.of([ticket.row for ticket in batch])
        try:
            outputs = await slot.run(rows)
        except SlotLostError as error:
            logger.warning("a replica was lost with %d rows: %s", len(batch), error)
            self._lose(batch)
        except EngineError as error:
            self._refuse(batch, error)
        else:
            self._observe(batch, rows, outputs)
            for index, ticket in enumerate(batch):
                if not ticket.future.done():
                    waited = (taken - ticket.arrived) * 1000
                    ticket.future.set_result(Answered(outputs.values[index], waited, outputs.infer_ms, len(batch)))
        finally:
            self._under_way.remove(batch)
            # Whatever happened above, cancellation and bugs included, nobody waits for an answer that cannot come.
            for ticket in batch:
                if id(ticket) not in self._waiting:
                    self._fail(ticket, FettleError("the batch ended without an answer"))

    def _observe(self, batch: list[Ticket], rows: Rows, outputs: Outputs) -> None:
        predicted = sum(ticket.cost_ms for ticket in batch)
        self._pace = policy.corrected_pace(self._pace, predicted, outputs.infer_ms)
        self.stats.rows += len(batch)
        self.stats.batches += 1
        self.stats.row_tokens += rows.tokens
        self.stats.batch_tokens += rows.longest * len(batch)
        self.stats.infer_ms += outputs.infer_ms

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
        """To the head of the queue, age kept, unless the row has failed or its client has left."""
        back = {id(ticket): ticket for ticket in batch if not ticket.future.done()}
        self.stats.retried += len(back)
        self._waiting = {**back, **self._waiting}

    def _fail(self, ticket: Ticket, error: FettleError) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(error)
