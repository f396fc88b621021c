"""What bounds a request: its time, and what is told of its errors."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from deployments.bounds import Telling, before, within
from fettle.errors import DeadlineError, FettleError, OverloadedError

pytestmark = pytest.mark.anyio


async def at_once() -> str:
    return "done"


async def after(seconds: float, *turns: float) -> str:
    for each in (seconds, *turns):
        await asyncio.sleep(each)
    return "done"


async def failing(seconds: float | None) -> str:
    if seconds is not None:
        await asyncio.sleep(seconds)
    raise ValueError("broken")


async def test_what_is_there_at_once_sets_no_timer(monkeypatch):
    monkeypatch.setattr(asyncio, "timeout", None)
    assert await within(5, at_once()) == "done"
    with pytest.raises(ValueError, match="broken"):
        await within(5, failing(None))


@pytest.mark.parametrize("turns", [(0.0,), (0.01,), (0.0, 0.01, 0.0)])
async def test_what_comes_in_time_is_given(turns):
    assert await within(5, after(*turns)) == "done"
    with pytest.raises(ValueError, match="broken"):
        await within(5, failing(turns[0]))


async def test_what_does_not_is_given_up():
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        await within(0.01, work())
    assert ended == [True]


async def test_whoever_waits_may_be_cancelled():
    ended = []

    async def work() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(True)
            raise
        return "done"

    task = asyncio.create_task(within(60, work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_work_that_withstands_is_not_lost():
    """As of whoever has to put something in order first."""

    async def work() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return "done"

    task = asyncio.create_task(within(60, work()))
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "done"


async def test_a_deadline_is_an_error_of_ours():
    with pytest.raises(DeadlineError):
        await before(time.monotonic() + 0.01, after(60))
    assert await before(time.monotonic() + 60, after(0.0)) == "done"
    assert await before(math.inf, at_once()) == "done"


async def test_only_errors_of_ours_are_told():
    told: list[FettleError] = []
    with Telling(told.append):
        pass
    with pytest.raises(ValueError, match="other"), Telling(told.append):
        raise ValueError("other")
    ours = OverloadedError("full", retry_after_s=1)
    with pytest.raises(OverloadedError), Telling(told.append):
        raise ours
    assert told == [ours]
