"""Calls that do not come back are given up and keep their place; streams say something regularly."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from deployments.silence import PARTS, Patience, told_regularly

pytestmark = pytest.mark.anyio

SOON_S = 0.02
LONG_S = 30.0


async def never() -> str:
    await asyncio.Event().wait()
    return "never"


async def test_a_call_that_ends_in_time_is_waited_for():
    call = asyncio.ensure_future(asyncio.sleep(SOON_S, "done"))
    assert await Patience(LONG_S, lambda: True).wait(call)
    assert call.result() == "done"


async def test_a_call_that_fails_in_time_has_ended():
    async def fail() -> None:
        raise ValueError("no")

    call = asyncio.ensure_future(fail())
    assert await Patience(LONG_S, lambda: True).wait(call)
    assert isinstance(call.exception(), ValueError)


async def test_a_silent_call_is_given_up_and_goes_on():
    call = asyncio.ensure_future(never())
    patience = Patience(SOON_S, lambda: True)
    assert not await patience.wait(call)
    assert not call.done()
    patience.forget()
    await asyncio.wait((call,))
    assert call.cancelled()


async def test_a_call_that_was_given_up_is_forgotten_in_the_end():
    call = asyncio.ensure_future(never())
    assert not await Patience(SOON_S, lambda: True, hold_s=SOON_S).wait(call)
    async with asyncio.timeout(LONG_S):
        await asyncio.wait((call,))
    assert call.cancelled()


async def test_time_without_a_replica_does_not_count():
    asked = 0

    def there() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3 * PARTS

    assert not await Patience(SOON_S, there).wait(asyncio.ensure_future(never()))
    assert asked == 4 * PARTS


async def test_whoever_stops_waiting_cancels_the_call():
    call = asyncio.ensure_future(never())
    waiting = asyncio.ensure_future(Patience(LONG_S, lambda: True).wait(call))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting, call))
    assert call.cancelled()


async def test_what_a_call_says_after_nobody_waits_is_not_complained_of():
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))

    async def answers_a_cancellation() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("cancelled over there") from None

    waiting = asyncio.create_task(Patience(LONG_S, lambda: True).wait(asyncio.ensure_future(answers_a_cancellation())))
    await asyncio.sleep(SOON_S)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await asyncio.sleep(SOON_S)
    # asyncio complains when a task is freed.
    del waiting
    gc.collect()
    assert said == []


async def test_a_source_that_has_nothing_is_heard_of_all_the_same():
    more = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        await more.wait()
        yield 2

    told: list[int | None] = []
    async for item in told_regularly(source(), SOON_S):
        told.append(item)
        if told.count(None) == 3:
            more.set()
    assert [item for item in told if item is not None] == [1, 2]
    assert told[:4] == [1, None, None, None]


async def test_closing_it_closes_the_source():
    closed = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    told = told_regularly(source(), SOON_S)
    assert await anext(told) == 1
    assert await anext(told) is None
    await told.aclose()
    assert closed.is_set()


async def test_what_the_source_raises_is_raised():
    async def source() -> AsyncIterator[int]:
        yield 1
        raise ValueError("broken")

    told = told_regularly(source(), LONG_S)
    assert await anext(told) == 1
    with pytest.raises(ValueError, match="broken"):
        await anext(told)
