"""Streams of a text variant's replicas: silence is a loss, a word without bits is not, and who leaves cancels."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from deployments.slots import SlotLostError
from deployments.text_variant import ReplicaStreams
from deployments.text_work import Bit
from fettle.generation import Finish
from tests.unit.test_text_engine import work

pytestmark = pytest.mark.anyio

SHORT_S, LONG_S = 0.05, 30.0


class Stream:
    """What Serve's handle gives for a streaming call: items of the test's making."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[list[Bit] | None] = asyncio.Queue()
        self.cancelled = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Bit]:
        item = await self.items.get()
        if item is None:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, _: object) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]


def streams_of(handle: Handle, patience_s: float) -> ReplicaStreams:
    made = ReplicaStreams(handle, patience_s)  # type: ignore[arg-type]
    made.resize(1)
    return made


async def test_bits_come_as_they_are_told_and_the_end_is_the_end():
    handle = Handle()
    told: list[list[Bit]] = []
    async with aclosing(streams_of(handle, LONG_S).generate(work())) as bits:
        first = asyncio.ensure_future(anext(bits))
        await asyncio.sleep(0)
        for item in ([], [Bit(0, "a")], [], [Bit(0, "b", finish=Finish.STOP)], None):
            handle.streams[0].items.put_nowait(item)
        told.append(await first)
        told += [item async for item in bits]
    assert told == [[Bit(0, "a")], [Bit(0, "b", finish=Finish.STOP)]]


async def test_words_without_bits_keep_a_slow_text_alive():
    handle = Handle()
    async with aclosing(streams_of(handle, 8 * SHORT_S).generate(work())) as bits:
        first = asyncio.ensure_future(anext(bits))
        # A stall of the loop counts as one part of four, however long it is.
        for _ in range(12):
            await asyncio.sleep(SHORT_S)
            handle.streams[0].items.put_nowait([])
        handle.streams[0].items.put_nowait([Bit(0, "late")])
        assert await first == [Bit(0, "late")]


async def test_silence_is_a_loss_and_the_stream_is_not_cancelled_while_its_replica_may_be_silent():
    handle = Handle()
    streams = streams_of(handle, SHORT_S)
    with pytest.raises(SlotLostError, match="no word"):
        async with aclosing(streams.generate(work())) as bits:
            await anext(bits)
    assert not handle.streams[0].cancelled
    streams.resize(0)
    await asyncio.sleep(0.01)
    assert handle.streams[0].cancelled


async def test_who_leaves_cancels_the_stream():
    handle = Handle()
    async with aclosing(streams_of(handle, LONG_S).generate(work())) as bits:
        first = asyncio.ensure_future(anext(bits))
        await asyncio.sleep(0)
        handle.streams[0].items.put_nowait([Bit(0, "a")])
        await first
    assert handle.streams[0].cancelled
