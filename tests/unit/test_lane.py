"""The queue before a text variant: turns, room, deadlines, and calls that outlive their replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import pytest

from deployments.lane import Lane
from deployments.slots import SlotLostError
from deployments.text_engine import TextEngine
from deployments.text_work import Bit, TextWork, merged
from deployments.tickets import Terms
from fettle.errors import DeadlineError, UnavailableError
from fettle.generation import Finish, Sampling
from fettle.latency import TextCosts
from fettle.manifest import LatencyCell, LatencyTable
from fettle.scheduling import NEVER, Priority
from tests.unit.test_text_engine import engine, work

pytestmark = pytest.mark.anyio

CELLS = [LatencyCell(batch=batch, length=16, median_ms=1.0, p95_ms=1.0) for batch in (1, 4)]
TABLE = LatencyTable(device="cpu", threads=1, cells=CELLS)
COSTS = TextCosts(TABLE, TABLE, rows=4, length=16)


class Engines:
    """The lane's replicas: engines in this process. `lose` says after how many bits a call's replica is gone."""

    def __init__(self, *engines: TextEngine, lose: Callable[[int], int | None] = lambda call: None) -> None:
        self.engines, self.lose, self.calls = engines, lose, 0
        self.running = 0
        self.most = 0

    @property
    def replicas(self) -> int:
        return len(self.engines)

    async def generate(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        left, used = self.lose(self.calls), self.engines[self.calls % len(self.engines)]
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async with aclosing(used.generate(work)) as stream:
                async for bits in stream:
                    if left is not None and left <= 0:
                        raise SlotLostError("killed")
                    left = None if left is None else left - len(bits)
                    yield bits
        finally:
            self.running -= 1


@pytest.fixture
async def engines() -> AsyncIterator[list[TextEngine]]:
    made = [engine(ms_per_call=1), engine(ms_per_call=1)]
    for each in made:
        each.start()
    yield made
    for each in made:
        each.close()


def lane(replicas: Engines, places: int = 4, **settings: object) -> Lane:
    return Lane(replicas, COSTS, places, **({"max_queue_s": 2.0} | settings))  # type: ignore[arg-type]


def terms(**given: object) -> Terms:
    return Terms(time.monotonic(), **given)  # type: ignore[arg-type]


async def everything(lane: Lane, asked: TextWork, of: Terms | None = None) -> dict[int, Bit]:
    async with aclosing(lane.generate(asked, of or terms())) as stream:
        return {bit.choice: bit for bit in merged([bit async for bits in stream for bit in bits])}


async def test_more_calls_than_places_wait_and_all_are_answered(engines):
    replicas = Engines(*engines)
    queue = lane(replicas, places=2)
    found = await asyncio.gather(*(everything(queue, work(f"w{n}", f"prompt-{n}")) for n in range(12)))
    assert all(bits[0].finish is Finish.LENGTH for bits in found)
    assert replicas.most == 4
    assert queue.depth == queue._taken == 0
    assert queue.backlog_s == 0.0


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_call_goes_on_at_another_replica_after_what_was_told(engines, streamed):
    asked = work("a", "one", "another", choices=2, stream=streamed, sampling=Sampling(seed=3, repetition_penalty=1.1))
    right = await everything(lane(Engines(*engines)), asked)
    # Without a stream all four come at once, or not at all.
    lossy = Engines(*engines, lose=lambda call: ((5, 9, 0) if streamed else (0, 0, 0))[call] if call < 3 else None)
    queue = lane(lossy)
    found = await everything(queue, work("b", "one", "another", choices=2, stream=streamed, sampling=asked.sampling))
    assert {n: (bit.text, bit.finish) for n, bit in found.items()} == {
        n: (bit.text, bit.finish) for n, bit in right.items()
    }
    assert lossy.calls >= 3
    assert queue.stats.retried == lossy.calls - 1


async def test_a_vote_begins_anew(engines):
    asked = work("v", "one", choices=5, vote=0.0)
    right = await everything(lane(Engines(*engines)), asked)
    found = await everything(lane(Engines(*engines, lose=lambda call: 0 if call == 0 else None)), asked)
    assert found[0].text == right[0].text


async def test_a_call_that_no_replica_survives_is_an_error(engines, monkeypatch):
    monkeypatch.setattr("deployments.lane.PAUSES_S", (0.0, 0.01))
    with pytest.raises(UnavailableError, match="5 attempts"):
        await everything(lane(Engines(*engines, lose=lambda call: 0)), work())


async def test_who_leaves_while_waiting_is_gone(engines):
    queue = lane(Engines(engines[0]), places=1)
    first = asyncio.create_task(everything(queue, work("first", max_tokens=(100,))))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(everything(queue, work("second")))
    await asyncio.sleep(0.01)
    assert queue.depth == 1
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (queue.depth, queue.stats.withdrawn) == (0, 1)
    assert len((await first)[0].tokens) == 100


async def test_room_is_for_what_waits(engines):
    queue = lane(Engines(engines[0]), places=2, max_queue_s=0.1)
    running = [asyncio.create_task(everything(queue, work(f"r{n}", max_tokens=(200,)))) for n in range(2)]
    await asyncio.sleep(0.03)
    assert queue.has_room(terms())
    waiting = []
    while queue.has_room(terms()):
        waiting.append(asyncio.create_task(everything(queue, work(f"w{len(waiting)}", max_tokens=(20,)))))
        await asyncio.sleep(0)
    assert 3 <= len(waiting) <= 60
    assert queue.overloaded(terms()).retry_after_s >= 1
    await asyncio.gather(*running, *waiting)
    assert queue.has_room(terms())


async def test_what_cannot_be_in_time_is_refused_and_costs_nothing(engines):
    replicas = Engines(engines[0])
    queue = lane(replicas, places=1)
    soon = terms(deadline=time.monotonic() + 0.005)
    with pytest.raises(DeadlineError, match="no free capacity"):
        await everything(queue, work("w", max_tokens=(400,)), soon)
    assert replicas.calls == 0


async def test_what_is_late_while_it_waits_or_runs_is_told(engines):
    replicas = Engines(engines[0])
    queue = lane(replicas, places=1)
    running = asyncio.create_task(everything(queue, work("r", max_tokens=(400,))))
    await asyncio.sleep(0.02)
    with pytest.raises(DeadlineError, match="turn came too late"):
        await everything(queue, work("w", max_tokens=(2,)), terms(deadline=time.monotonic() + 0.1))
    await running
    with pytest.raises(DeadlineError, match="not answered"):
        await everything(queue, work("x", max_tokens=(480,)), terms(deadline=time.monotonic() + 0.4))
    assert queue.stats.late == 2
    assert replicas.running == 0


async def test_lower_priorities_fill_gaps_only(engines):
    queue = lane(Engines(engines[0]), places=1)
    order: list[str] = []

    async def ask(name: str, priority: Priority) -> None:
        await everything(queue, work(name), terms(priority=priority))
        order.append(name)

    first = asyncio.create_task(ask("first", Priority.INTERACTIVE))
    await asyncio.sleep(0.01)
    tasks = [asyncio.create_task(ask("batch", Priority.BATCH))]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(ask(f"later-{n}", Priority.INTERACTIVE)) for n in range(2)]
    await asyncio.gather(first, *tasks)
    assert order == ["first", "later-0", "later-1", "batch"]


def test_the_longest_wait_is_no_deadline():
    assert terms().deadline == NEVER
