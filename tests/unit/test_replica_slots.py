"""The slots of a deployment whose replicas fall silent: calls are done elsewhere, and their places stay taken."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from deployments.slots import SlotLostError
from deployments.variant import ReplicaSlots
from fettle.errors import EngineError
from fettle.rows import Outputs, Row, Rows

pytestmark = pytest.mark.anyio

SHORT_S = 0.02
LONG_S = 30.0
ROWS = Rows.of([Row(np.array([1, 2, 3], np.int32))])
REPLY = (np.ones((1, 1), np.float32), 1.0, None, None)


class Handle:
    """A deployment's handle, whose calls end when they are told to."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[Any]] = []

    def options(self, **_: object) -> Handle:
        return self

    @property
    def run(self) -> Handle:
        return self

    def remote(self, *_: object) -> asyncio.Future[Any]:
        self.calls.append(asyncio.get_running_loop().create_future())
        return self.calls[-1]


def slots_of(handle: Handle, patience_s: float) -> ReplicaSlots:
    made = ReplicaSlots(handle, places=1, stuck_after_s=patience_s)  # type: ignore[arg-type]
    made.resize(1)
    return made


async def run(slots: ReplicaSlots) -> Outputs:
    async with slots.reserve() as slot:
        return await slot.run(ROWS, None)


async def called(handle: Handle, number: int) -> asyncio.Future[Any]:
    async with asyncio.timeout(LONG_S):
        while len(handle.calls) < number:
            await asyncio.sleep(0)
    return handle.calls[number - 1]


async def test_a_reply_in_time_is_one_and_frees_its_place():
    handle = Handle()
    slots = slots_of(handle, LONG_S)
    for number in (1, 2):
        task = asyncio.create_task(run(slots))
        (await called(handle, number)).set_result(REPLY)
        assert (await task).infer_ms == 1.0


async def test_what_the_engine_refuses_is_its_error():
    handle = Handle()
    task = asyncio.create_task(run(slots_of(handle, LONG_S)))
    (await called(handle, 1)).set_result("no such token")
    with pytest.raises(EngineError, match="no such token"):
        await task


async def test_a_silent_call_is_lost_and_its_place_stays_taken_until_it_ends():
    handle = Handle()
    slots = slots_of(handle, SHORT_S)
    with pytest.raises(SlotLostError, match="no reply"):
        await run(slots)
    again = asyncio.create_task(run(slots))
    await asyncio.sleep(5 * SHORT_S)
    assert len(handle.calls) == 1
    handle.calls[0].set_result(REPLY)
    (await called(handle, 2)).set_result(REPLY)
    assert (await again).infer_ms == 1.0


async def test_the_place_is_free_once_a_replica_is_gone():
    handle = Handle()
    slots = slots_of(handle, SHORT_S)
    with pytest.raises(SlotLostError):
        await run(slots)
    slots.resize(0)
    again = asyncio.create_task(run(slots))
    (await called(handle, 2)).set_result(REPLY)
    assert (await again).infer_ms == 1.0
    assert handle.calls[0].cancelled()


async def test_a_call_waits_for_a_first_replica_however_long_that_takes():
    handle = Handle()
    slots = slots_of(handle, SHORT_S)
    slots.resize(0)
    task = asyncio.create_task(run(slots))
    call = await called(handle, 1)
    await asyncio.sleep(5 * SHORT_S)
    assert not task.done()
    call.set_result(REPLY)
    assert (await task).infer_ms == 1.0


async def test_silent_calls_do_not_keep_a_router_from_the_replicas_that_speak():
    """Two replicas of two places, of which this router has half: both of its calls went to the silent one."""
    handle = Handle()
    slots = ReplicaSlots(handle, places=2, share=0.5, stuck_after_s=SHORT_S)  # type: ignore[arg-type]
    slots.resize(2)
    assert slots.capacity == 2
    lost = [asyncio.create_task(run(slots)) for _ in range(2)]
    for task in lost:
        with pytest.raises(SlotLostError):
            await task
    assert slots.capacity == 1
    again = asyncio.create_task(run(slots))
    (await called(handle, 3)).set_result(REPLY)
    assert (await again).infer_ms == 1.0
    slots.resize(1)
    await asyncio.sleep(0.01)
    assert slots.capacity == 1
