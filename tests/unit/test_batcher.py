"""The batcher on a real event loop, with slots in this process that the tests open, close, lose and break."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from deployments import batcher as module
from deployments.batcher import MAX_LOSSES, Batcher
from deployments.slots import SlotLostError
from deployments.tickets import Answered, Leg, Terms
from fettle.errors import DeadlineError, EngineError, FettleError, UnavailableError
from fettle.points import NEVER as NO_EXIT
from fettle.rows import Exits, Outputs, Row, Rows
from fettle.scheduling import NEVER, BatchBounds, Priority, Queue

pytestmark = pytest.mark.anyio

NEVER_S = 1e9
SOMEBODY = Terms(0.0)
# A test that waits this long waits for something that never comes.
PATIENCE_S = 30.0

Engine = Callable[[list[int]], None]


def row(number: int, length: int = 4) -> Row:
    """A row that can be told from all others: its number is its every token."""
    return Row(np.full(length, number, np.int32))


def numbers_of(rows: Rows) -> list[int]:
    starts = np.concatenate([[0], np.cumsum(rows.lengths)[:-1]])
    return [int(number) for number in rows.ids[starts]]


def works(numbers: list[int]) -> None:
    """An engine that answers everything."""


class LocalSlots:
    """`places` at replicas in this process. The gate holds every batch back that was handed over."""

    replicas = 1

    def __init__(self, places: int = 1, engine: Engine = works) -> None:
        self.free = asyncio.Semaphore(places)
        self.engine = engine
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[list[int]] = []
        self.reservations = 0
        self.refuse: list[Exception] = []
        self.fail_on_release: list[Exception] = []

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[LocalSlot]:
        self.reservations += 1
        if self.refuse:
            raise self.refuse.pop(0)
        async with self.free:
            yield LocalSlot(self)
            if self.fail_on_release:
                raise self.fail_on_release.pop(0)


class LocalSlot:
    def __init__(self, slots: LocalSlots) -> None:
        self._slots = slots

    async def run(self, rows: Rows, exits: Exits | None) -> Outputs:
        numbers = numbers_of(rows)
        self._slots.calls.append(numbers)
        await self._slots.gate.wait()
        self._slots.engine(numbers)
        return Outputs(np.array(numbers, np.float32)[:, None], 1.0)


class TokenCost:
    def row_ms(self, length: int) -> float:
        return 0.1 * length


def make(slots: LocalSlots, *, rows: int = 64, tokens: int = 10_000, max_age_s: float = NEVER_S) -> Batcher:
    bounds = BatchBounds(rows=rows, tokens=tokens, max_age_s=max_age_s)
    return Batcher(slots=slots, cost=TokenCost(), queue=Queue(bounds), max_queue_s=1.0)


def ask(batcher: Batcher, *rows: Row, leg: Leg | None = None, **terms: Any) -> asyncio.Task[list[Answered]]:
    """A request; `terms` beside its arrival, `within_s` for its deadline."""
    now = time.monotonic()
    deadline = now + terms.pop("within_s", NEVER)
    return asyncio.get_running_loop().create_task(batcher.answer(rows, Terms(now, deadline, **terms), leg))


async def settle() -> None:
    """Let everything run that can run without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)


async def answers(*tasks: asyncio.Task[list[Answered]]) -> list[list[float]]:
    async with asyncio.timeout(PATIENCE_S):
        return [[float(answered.values[0]) for answered in await task] for task in tasks]


async def failure(task: asyncio.Task[list[Answered]]) -> BaseException:
    async with asyncio.timeout(PATIENCE_S):
        [outcome] = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(outcome, BaseException), f"it was answered: {outcome}"
    return outcome


def assert_empty(batcher: Batcher) -> None:
    assert batcher.depth == 0
    assert [batcher.queue.work_ms(priority) for priority in Priority] == pytest.approx([0, 0, 0], abs=1e-9)
    assert batcher.queue._under_way_ms == pytest.approx(0.0, abs=1e-9)
    assert not batcher.queue._admitted
    assert not batcher._singles
    assert len(batcher._flights) == 0


async def test_one_row_in_an_idle_system_goes_out_at_once_and_alone():
    slots = LocalSlots()
    batcher = make(slots)
    [answer] = await batcher.answer([row(7)])
    assert slots.calls == [[7]]
    assert answer.batch_rows == 1
    assert answer.infer_ms == 1.0
    assert answer.queue_ms >= 0
    assert_empty(batcher)


async def test_the_rows_of_one_request_come_back_in_their_order():
    slots = LocalSlots()
    batcher = make(slots, rows=3)
    lengths = [9, 1, 5, 5, 30, 2, 9]
    assert await answers(ask(batcher, *(row(n, length) for n, length in enumerate(lengths)))) == [[0, 1, 2, 3, 4, 5, 6]]
    assert all(len(call) <= 3 for call in slots.calls)


async def test_rows_that_arrive_while_the_slot_is_busy_go_out_together():
    slots = LocalSlots(places=1)
    slots.gate.clear()
    batcher = make(slots)
    tasks = [ask(batcher, row(0))]
    await settle()
    for number in range(1, 21):
        tasks.append(ask(batcher, row(number)))
        await settle()
    assert slots.calls == [[0]]
    assert batcher.depth == 20
    slots.gate.set()
    assert await answers(*tasks) == [[n] for n in range(21)]
    assert slots.calls == [[0], list(range(1, 21))]


async def test_rows_wait_in_the_queue_and_not_at_a_reservation():
    """One reservation at a time is pending, or rows would be bound to replicas before those are free."""
    slots = LocalSlots(places=1)
    slots.gate.clear()
    batcher = make(slots, rows=1)
    tasks = [ask(batcher, row(number)) for number in range(10)]
    await settle()
    assert slots.reservations == 2
    slots.gate.set()
    await answers(*tasks)
    assert slots.reservations == 10


async def test_every_free_replica_is_used():
    slots = LocalSlots(places=3)
    slots.replicas = 3
    slots.gate.clear()
    batcher = make(slots, rows=2)
    tasks = [ask(batcher, row(number)) for number in range(10)]
    await settle()
    assert slots.calls == [[0, 1], [2, 3], [4, 5]]
    slots.gate.set()
    await answers(*tasks)


async def test_a_batch_leaves_when_a_replica_is_about_to_be_free_and_not_before():
    """Or as soon as the batch before it is back, where that is earlier than was predicted."""
    slots = LocalSlots(places=2)
    slots.gate.clear()
    # 400 ms of predicted work at the only replica; the second place would hold a batch that waits there.
    batcher = make(slots, rows=1)
    first = ask(batcher, row(0, length=4000))
    await settle()
    second = ask(batcher, row(1))
    await settle()
    assert slots.calls == [[0]]
    urgent = asyncio.get_running_loop().create_task(
        batcher.answer([row(2)], Terms(time.monotonic(), deadline=time.monotonic() + 0.9))
    )
    await settle()
    slots.gate.set()
    assert await answers(first, urgent, second) == [[0], [2], [1]]
    assert slots.calls == [[0], [2], [1]]


async def test_rows_of_one_length_travel_together():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots, rows=4)
    tasks = [ask(batcher, row(0))]
    await settle()
    lengths = [5, 100, 5, 100, 5, 100, 5, 100]
    tasks += [ask(batcher, row(number, length)) for number, length in enumerate(lengths, start=1)]
    await settle()
    slots.gate.set()
    await answers(*tasks)
    assert [sorted(call) for call in slots.calls] == [[0], [1, 3, 5, 7], [2, 4, 6, 8]]


async def test_overdue_rows_are_not_passed_over_for_a_better_fit():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots, rows=2, max_age_s=0.0)
    tasks = [ask(batcher, row(0))]
    await settle()
    tasks += [ask(batcher, row(number, length)) for number, length in enumerate([5, 100, 5, 100], start=1)]
    await settle()
    slots.gate.set()
    await answers(*tasks)
    assert slots.calls == [[0], [1, 2], [3, 4]]


async def test_a_batch_keeps_to_the_token_budget():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots, tokens=40)
    tasks = [ask(batcher, row(number, 10)) for number in range(9)]
    await settle()
    slots.gate.set()
    await answers(*tasks)
    assert [len(call) for call in slots.calls] == [4, 4, 1]


async def test_a_client_that_leaves_the_queue_frees_its_place():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    first = ask(batcher, row(0))
    await settle()
    leaving = [ask(batcher, row(number), row(number)) for number in range(1, 6)]
    staying = ask(batcher, row(9))
    await settle()
    assert batcher.depth == 11
    for task in leaving:
        task.cancel()
    await settle()
    assert batcher.depth == 1
    assert batcher.stats.withdrawn == 10
    assert batcher.backlog_s == pytest.approx(batcher._pace * 2 * 0.4 / 1000)
    slots.gate.set()
    assert await answers(first, staying) == [[0], [9]]
    assert slots.calls == [[0], [9]]
    assert all([isinstance(await failure(task), asyncio.CancelledError) for task in leaving])
    assert_empty(batcher)


async def test_a_client_that_leaves_while_its_batch_runs_does_not_harm_its_neighbours():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    blocker = ask(batcher, row(0))
    await settle()
    tasks = [ask(batcher, row(number)) for number in (1, 2, 3)]
    await settle()
    slots.gate.set()
    slots.gate.clear()
    await settle()
    assert slots.calls[-1] == [1, 2, 3]
    tasks[1].cancel()
    await settle()
    slots.gate.set()
    assert await answers(blocker, tasks[0], tasks[2]) == [[0], [1], [3]]
    assert batcher.stats.withdrawn == 0
    assert_empty(batcher)


async def test_a_reservation_for_clients_that_all_left_runs_nothing_and_is_given_back():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    first = ask(batcher, row(0))
    await settle()
    gone = ask(batcher, row(1))
    await settle()
    gone.cancel()
    slots.gate.set()
    await answers(first)
    await settle()
    assert slots.calls == [[0]]
    assert not slots.free.locked()
    assert await answers(ask(batcher, row(2))) == [[2]]


async def test_a_lost_batch_goes_out_again_before_the_rows_that_came_later():
    lost = [SlotLostError("gone")]

    def engine(numbers: list[int]) -> None:
        if lost:
            raise lost.pop()

    slots = LocalSlots(engine=engine)
    slots.gate.clear()
    batcher = make(slots, rows=2)
    tasks = [ask(batcher, row(number)) for number in range(4)]
    await settle()
    slots.gate.set()
    assert await answers(*tasks) == [[0], [1], [2], [3]]
    assert slots.calls[0] == slots.calls[1] == [0, 1]
    assert batcher.stats.retried == 2
    assert_empty(batcher)


async def test_a_retried_row_keeps_its_age():
    losses = [SlotLostError("gone")]

    def engine(numbers: list[int]) -> None:
        if losses:
            raise losses.pop()

    slots = LocalSlots(engine=engine)
    slots.gate.clear()
    batcher = make(slots)
    task = ask(batcher, row(1))
    await asyncio.sleep(0.05)
    slots.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        [answer] = await task
    assert len(slots.calls) == 2
    assert answer.queue_ms >= 50, "its time counts from its arrival, not from its return to the queue"


async def test_a_row_that_is_lost_again_and_again_ends_in_unavailable():
    def engine(numbers: list[int]) -> None:
        raise SlotLostError("gone")

    slots = LocalSlots(engine=engine)
    batcher = make(slots)
    error = await failure(ask(batcher, row(1)))
    assert isinstance(error, UnavailableError)
    assert len(slots.calls) == MAX_LOSSES
    assert_empty(batcher)


async def test_a_row_that_the_engine_refuses_fails_alone():
    def engine(numbers: list[int]) -> None:
        if 13 in numbers:
            raise EngineError("13 is not for me")

    slots = LocalSlots(engine=engine)
    slots.gate.clear()
    batcher = make(slots)
    tasks = {number: ask(batcher, row(number)) for number in range(10, 16)}
    await settle()
    slots.gate.set()
    error = await failure(tasks.pop(13))
    assert isinstance(error, EngineError)
    assert error.message == "13 is not for me"
    assert await answers(*tasks.values()) == [[number] for number in tasks]
    assert_empty(batcher)


async def test_one_bad_row_of_a_request_fails_the_request_and_takes_its_other_rows_out_of_the_queue():
    def engine(numbers: list[int]) -> None:
        if 13 in numbers:
            raise EngineError("13 is not for me")

    slots = LocalSlots(engine=engine)
    slots.gate.clear()
    batcher = make(slots, rows=1)
    first = ask(batcher, row(0))
    await settle()
    bad = ask(batcher, row(13), row(14), row(15))
    other = ask(batcher, row(16))
    await settle()
    slots.gate.set()
    assert isinstance(await failure(bad), EngineError)
    assert await answers(first, other) == [[0], [16]]
    assert_empty(batcher)


class TwoReplicas:
    """Two replicas with two places each. A replica that runs `killer` dies, with all the batches that it holds."""

    replicas = 2

    def __init__(self, killer: int) -> None:
        self.killer = killer
        self.held: dict[str, set[asyncio.Future[None]]] = {"a": set(), "b": set()}
        self.places = {name: asyncio.Semaphore(2) for name in self.held}
        self.next = 0
        self.deaths = 0

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[ReplicaPlace]:
        # In turn, so that a batch often waits behind another at the same replica.
        name = "ab"[self.next // 2 % 2]
        self.next += 1
        async with self.places[name]:
            yield ReplicaPlace(self, name)


class ReplicaPlace:
    def __init__(self, replicas: TwoReplicas, name: str) -> None:
        self._replicas = replicas
        self.replica = name

    async def run(self, rows: Rows, exits: Exits | None) -> Outputs:
        numbers = numbers_of(rows)
        held = self._replicas.held[self.replica]
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held.add(done)
        loop = asyncio.get_running_loop()
        if self._replicas.killer in numbers:
            loop.call_later(0.002, self._die, held)
        else:
            loop.call_later(0.004, lambda: done.done() or done.set_result(None))
        try:
            await done
        finally:
            held.discard(done)
        return Outputs(np.array(numbers, np.float32)[:, None], 1.0)

    def _die(self, held: set[asyncio.Future[None]]) -> None:
        self._replicas.deaths += 1
        for waiting in list(held):
            if not waiting.done():
                waiting.set_exception(SlotLostError("the replica died"))


async def test_a_row_that_kills_replicas_takes_no_other_row_along():
    """Not the rows of its own batch, nor those of batches that wait at the same replica."""
    replicas = TwoReplicas(killer=13)
    batcher = make(replicas, rows=4)  # type: ignore[arg-type]
    tasks = {number: ask(batcher, row(number)) for number in range(30)}
    error = await failure(tasks.pop(13))
    assert isinstance(error, UnavailableError)
    assert await answers(*tasks.values()) == [[number] for number in tasks]
    assert replicas.deaths == MAX_LOSSES
    assert_empty(batcher)


async def test_a_bug_in_the_slot_fails_every_row_and_the_next_ones_are_answered():
    bugs: list[Exception] = [KeyError("a bug")]

    def engine(numbers: list[int]) -> None:
        if bugs:
            raise bugs.pop()

    slots = LocalSlots(engine=engine)
    slots.gate.clear()
    batcher = make(slots)
    tasks = [ask(batcher, row(number)) for number in range(3)]
    await settle()
    slots.gate.set()
    outcomes = [await failure(task) for task in tasks]
    assert all(isinstance(error, FettleError) for error in outcomes)
    assert await answers(ask(batcher, row(4))) == [[4]]
    assert_empty(batcher)


async def test_an_engine_that_returns_too_few_rows_leaves_nobody_waiting():
    class Short(LocalSlots):
        @asynccontextmanager
        async def reserve(self) -> AsyncIterator[object]:
            class Slot:
                replica = "r"

                async def run(self, rows: Rows, exits: Exits | None) -> Outputs:
                    return Outputs(np.zeros((len(rows) - 1, 1), np.float32), 1.0)

            yield Slot()

    batcher = make(Short())
    tasks = [ask(batcher, row(number)) for number in range(3)]
    outcomes = [await failure(task) for task in tasks[-1:]]
    assert isinstance(outcomes[0], FettleError)
    assert_empty(batcher)


@pytest.mark.parametrize("refusal", [SlotLostError("nobody there"), RuntimeError("a bug")], ids=["lost", "bug"])
async def test_a_reservation_that_fails_is_tried_again(refusal: Exception):
    slots = LocalSlots()
    slots.refuse = [refusal, refusal]
    batcher = make(slots)
    assert await answers(ask(batcher, row(1)), ask(batcher, row(2))) == [[1], [2]]
    assert_empty(batcher)


async def test_a_lost_batch_is_retried_even_if_giving_its_place_back_fails_too():
    """The replica is dead, so releasing the slot may raise as well: the rows must not be forgotten in the queue."""
    lost = [SlotLostError("gone")]

    def engine(numbers: list[int]) -> None:
        if lost:
            raise lost.pop()

    slots = LocalSlots(engine=engine)
    slots.fail_on_release = [SlotLostError("gone, says the release")]
    batcher = make(slots)
    assert await answers(ask(batcher, row(1))) == [[1]]
    assert_empty(batcher)


async def test_a_full_queue_refuses_and_says_when_to_come_back():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    first = ask(batcher, row(0, 1))
    await settle()
    assert batcher.has_room(SOMEBODY)
    # 0.1 ms a token: 30,000 tokens are 3 s of work for a limit of 1 s.
    big = ask(batcher, *(row(number, 1000) for number in range(1, 31)))
    await settle()
    assert not batcher.has_room(SOMEBODY)
    refused = batcher.overloaded(SOMEBODY)
    assert refused.retry_after_s == 3
    assert "the limit is 1 s" in refused.message
    assert batcher.stats.refused == 1
    big.cancel()
    await settle()
    assert batcher.has_room(SOMEBODY)
    slots.gate.set()
    await answers(first)


async def test_a_request_larger_than_the_limit_is_answered_by_an_idle_system():
    batcher = make(LocalSlots(), rows=8)
    assert batcher.has_room(SOMEBODY)
    many = [row(number, 1000) for number in range(30)]
    assert await answers(ask(batcher, *many)) == [[*range(30)]]


async def test_ready_means_that_there_is_a_replica():
    slots = LocalSlots()
    batcher = make(slots)
    assert batcher.is_ready
    slots.replicas = 0
    assert not batcher.is_ready


async def test_twice_the_replicas_drain_in_half_the_time():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    task = ask(batcher, row(0, 100), row(1, 100))
    await settle()
    alone = batcher.backlog_s
    slots.replicas = 2
    assert batcher.backlog_s == pytest.approx(alone / 2)
    slots.gate.set()
    await answers(task)


async def test_the_counters_tell_what_happened():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    tasks = [ask(batcher, row(0, 3))]
    await settle()
    tasks += [ask(batcher, row(number, length)) for number, length in ((1, 2), (2, 8))]
    await settle()
    slots.gate.set()
    await answers(*tasks)
    assert batcher.stats.rows == 3
    assert batcher.stats.batches == 2
    assert batcher.stats.row_tokens == 13
    assert batcher.stats.batch_tokens == 3 + 16
    assert batcher.stats.infer_ms == 2.0


# Deadlines, priorities, exits.


async def test_what_cannot_be_in_time_is_refused_at_once_and_costs_nothing():
    slots = LocalSlots()
    batcher = make(slots)
    error = await failure(ask(batcher, row(1, 100), within_s=0.005))
    assert isinstance(error, DeadlineError)
    assert slots.calls == []
    assert batcher.stats.late == 1
    assert await answers(ask(batcher, row(2, 100), within_s=30.0)) == [[2]]
    assert_empty(batcher)


async def test_rows_that_became_late_while_they_waited_are_not_run():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    first = ask(batcher, row(0))
    await settle()
    late, patient = ask(batcher, row(1), within_s=0.02), ask(batcher, row(2))
    await asyncio.sleep(0.03)
    slots.gate.set()
    assert await answers(first, patient) == [[0], [2]]
    assert isinstance(await failure(late), DeadlineError)
    assert slots.calls == [[0], [2]]
    assert batcher.stats.late == 1
    assert_empty(batcher)


async def test_the_earliest_deadline_goes_first():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots, rows=1)
    batcher.max_queue_s = 10.0
    tasks = [ask(batcher, row(0))]
    await settle()
    for number, within_s in enumerate([90.0, 7.0, 12.0, 8.0], start=1):
        tasks.append(ask(batcher, row(number), within_s=within_s))
    await settle()
    slots.gate.set()
    await answers(*tasks)
    # A row that has time is as urgent as the longest admissible wait, 10 s, makes it.
    assert slots.calls == [[0], [2], [4], [1], [3]]


async def test_admitted_rows_are_not_asked_again_whether_they_fit(monkeypatch):
    batcher = make(LocalSlots())
    monkeypatch.setattr(Queue, "can_promise", lambda *_: False)
    assert isinstance(await failure(ask(batcher, row(1), within_s=5.0)), DeadlineError)
    assert await answers(ask(batcher, row(1), leg=Leg(admitted=True), within_s=5.0)) == [[1]]


async def test_what_later_steps_will_take_is_kept_free_before_the_deadline():
    batcher = make(LocalSlots())
    assert await answers(ask(batcher, row(1), leg=Leg(reserve_s=1.0), within_s=30.0)) == [[1]]
    assert isinstance(await failure(ask(batcher, row(2), leg=Leg(reserve_s=30.0), within_s=30.0)), DeadlineError)


async def test_a_row_costs_the_share_of_a_run_that_it_takes_on_average():
    slots = LocalSlots()
    slots.gate.clear()
    batcher = make(slots)
    task = ask(batcher, row(1, 100), leg=Leg(share=0.25))
    await settle()
    assert batcher.queue.work_ms() == pytest.approx(2.5)
    slots.gate.set()
    await answers(task)


async def test_lower_priorities_wait_for_a_gap():
    slots = LocalSlots(places=2)
    slots.gate.clear()
    batcher = make(slots)
    batcher.calm = lambda: calm
    calm = False
    first = ask(batcher, row(0))
    await settle()
    filler = [ask(batcher, row(1), priority=Priority.BATCH), ask(batcher, row(2), priority=Priority.SHADOW)]
    await settle()
    assert slots.calls == [[0]], "the one replica is busy, even if it has a place left"
    slots.gate.set()
    assert await answers(first) == [[0]]
    await settle()
    assert slots.calls == [[0]], "idle, but the system is not calm"
    later = ask(batcher, row(3))
    assert await answers(later) == [[3]]
    calm = True
    assert await answers(*filler) == [[1], [2]]
    assert slots.calls == [[0], [3], [1], [2]]
    assert_empty(batcher)


async def test_the_work_of_lower_priorities_is_no_load():
    slots = LocalSlots()
    batcher = make(slots)
    batcher.calm = lambda: False
    waiting = ask(batcher, *(row(number, 1000) for number in range(20)), priority=Priority.BATCH)
    await settle()
    assert batcher.backlog_s == 0
    assert batcher.has_room(SOMEBODY)
    assert batcher.queue.work_ms(Priority.BATCH) == pytest.approx(2000)
    waiting.cancel()
    await settle()
    assert_empty(batcher)


class Noting(LocalSlots):
    """Keeps the exits of each batch, and says where rows left."""

    def __init__(self) -> None:
        super().__init__()
        self.exits: list[Exits | None] = []

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[Noting]:  # type: ignore[override]
        async with self.free:
            yield self

    async def run(self, rows: Rows, exits: Exits | None) -> Outputs:
        numbers = numbers_of(rows)
        self.calls.append(numbers)
        self.exits.append(exits)
        await self.gate.wait()
        values = np.array(numbers, np.float32)[:, None]
        stages = np.array(numbers, np.int8) % 3
        return Outputs(values, 1.0, stages, None if exits is None else np.tile(values / 100, (1, 2)))


def gates(*thresholds: float) -> Leg:
    return Leg(gates=(np.array(thresholds, np.float32), np.full(len(thresholds), 1.5, np.float32)))


async def test_rows_of_several_points_share_a_batch_each_with_its_own_exits():
    slots = Noting()
    slots.gate.clear()
    batcher = make(slots)
    batcher.stages = 3
    first = ask(batcher, row(0))
    await settle()
    tasks = [ask(batcher, row(1), leg=gates(0.5, 0.25)), ask(batcher, row(2)), ask(batcher, row(4), leg=gates(0.75, 1))]
    await settle()
    slots.gate.set()
    await answers(first)
    found = [(await task)[0] for task in tasks]
    assert slots.calls == [[0], [1, 2, 4]]
    none, mixed = slots.exits
    assert none is None
    assert mixed is not None
    assert mixed.thresholds.tolist() == [[0.5, 0.25], [NO_EXIT, NO_EXIT], [0.75, 1]]
    assert mixed.temperatures.tolist() == [[1.5, 1.5], [1, 1], [1.5, 1.5]]
    assert [answer.stage for answer in found] == [1, 2, 1]
    assert [answer.scores.tolist() for answer in found] == np.float32([[0.01] * 2, [0.02] * 2, [0.04] * 2]).tolist()


class Storm:
    """Losses, refusals, engine errors and bugs, drawn from a seed; remembers who was run, and when."""

    replicas = 3

    def __init__(self, seed: int, poison: set[int]) -> None:
        self.random = random.Random(seed)
        self.poison = poison
        self.free = asyncio.Semaphore(3)
        self.answered: list[int] = []
        self.gone: set[int] = set()
        self.run_in_vain: list[int] = []

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[Storm]:
        await self._pause()
        if self.random.random() < 0.05:
            raise SlotLostError("no replica")
        async with self.free:
            yield self
            if self.random.random() < 0.03:
                raise SlotLostError("gone while releasing")

    async def run(self, rows: Rows, exits: Exits | None) -> Outputs:
        numbers = numbers_of(rows)
        self.run_in_vain += [number for number in numbers if number in self.gone]
        await self._pause()
        luck = self.random.random()
        if luck < 0.08:
            raise SlotLostError("gone")
        if luck < 0.10:
            raise ZeroDivisionError("a bug")
        if self.poison & set(numbers):
            raise EngineError("poison")
        self.answered += numbers
        return Outputs(np.array(numbers, np.float32)[:, None], 1.0)

    async def _pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        if self.random.random() < 0.1:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("seed", range(8))
async def test_every_row_leaves_exactly_once_in_a_storm(seed: int, monkeypatch):
    monkeypatch.setattr(module, "RESERVE_AGAIN_S", 0.001)
    chance = random.Random(seed)
    poison = set(chance.sample(range(900), 20))
    storm = Storm(seed, poison)
    batcher = make(storm, rows=8, tokens=200, max_age_s=0.002)  # type: ignore[arg-type]
    outcomes: dict[int, object] = {}

    async def client(numbers: Sequence[int], patience: int | None) -> None:
        rows = [row(number, chance.randrange(1, 50)) for number in numbers]
        task = ask(batcher, *rows)
        if patience is not None:
            for _ in range(patience):
                await asyncio.sleep(0)
            # What is cancelled here may be running already; what still waits must never run.
            waiting = {int(ticket.row.ids[0]) for ticket in batcher.queue} & set(numbers)
            if task.cancel():
                storm.gone |= waiting
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        for index, number in enumerate(numbers):
            assert number not in outcomes
            outcomes[number] = outcome[index] if isinstance(outcome, list) else outcome

    clients = []
    number = 0
    async with asyncio.timeout(PATIENCE_S):
        while number < 900:
            size = min(chance.randrange(1, 5), 900 - number)
            patience = chance.randrange(40) if chance.random() < 0.2 else None
            clients.append(asyncio.ensure_future(client(range(number, number + size), patience)))
            number += size
            if chance.random() < 0.3:
                await asyncio.sleep(0)
        await asyncio.gather(*clients)
        await asyncio.gather(*batcher._tasks, return_exceptions=True)

    assert sorted(outcomes) == list(range(900))
    assert len(set(storm.answered)) == len(storm.answered), "a row was answered twice"
    assert storm.run_in_vain == []
    for number, outcome in outcomes.items():
        if isinstance(outcome, Answered):
            assert outcome.values[0] == number
            assert number not in poison
        else:
            assert isinstance(outcome, FettleError | asyncio.CancelledError), repr(outcome)
    assert sum(isinstance(outcome, Answered) for outcome in outcomes.values()) > 500
    assert batcher.stats.rows == len(storm.answered)
    assert not storm.free.locked()
    assert_empty(batcher)


@pytest.mark.parametrize(("owner", "name"), [("Rows", "of"), ("Flights", "depart"), ("Flights", "nearly_free")])
async def test_a_bug_of_ours_costs_at_most_the_rows_of_its_batch(monkeypatch, owner, name):
    left = [1]
    real = getattr(getattr(module, owner), name)

    def broken_once(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise RuntimeError("a bug")
        return real(*arguments)

    monkeypatch.setattr(getattr(module, owner), name, broken_once)
    batcher = make(LocalSlots())
    async with asyncio.timeout(PATIENCE_S):
        outcome = (await asyncio.gather(ask(batcher, row(1)), return_exceptions=True))[0]
        assert isinstance(outcome, list) or "ended without an answer" in str(outcome)
        assert await answers(ask(batcher, row(2))) == [[2.0]]
    assert not left
    assert_empty(batcher)
