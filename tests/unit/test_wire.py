"""Calls over the wire between a router's link and a replica's server, on real sockets of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deployments import wire
from deployments.link import Link
from deployments.links import Links
from deployments.slots import SlotLostError
from deployments.wire import Endpoint
from deployments.wire_server import WireServer

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1"
LONG_S = 30.0


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Ray's processes run uvloop where there is one."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


class Replica:
    """Doubles arrays, counts up to what it is told, and holds calls until it is told to go on."""

    def __init__(self) -> None:
        self.server = WireServer(
            {"double": self.double, "held": self.held, "broken": self.broken}, {"count": self.count}
        )
        self.go = asyncio.Event()
        self.held_now = 0
        self.closed = 0

    async def double(self, values: Any) -> Any:
        return 2 * values

    async def held(self, value: int) -> int:
        self.held_now += 1
        try:
            await self.go.wait()
        finally:
            self.held_now -= 1
        return value

    async def broken(self) -> None:
        raise ValueError("out of order")

    async def count(self, number: int) -> AsyncGenerator[int, None]:
        try:
            for value in range(number):
                yield value
                await asyncio.sleep(0)
            if not number:
                await self.go.wait()
        finally:
            self.closed += 1


@asynccontextmanager
async def replica() -> AsyncIterator[tuple[Replica, Endpoint]]:
    made = Replica()
    endpoint = await made.server.start(HOST)
    try:
        yield made, endpoint
    finally:
        made.go.set()
        await made.server.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_call_comes_back_with_its_own_value_however_many_are_under_way():
    async with replica() as (_, endpoint):
        link = await Link.open(endpoint, LONG_S)
        sent = [np.full((50, 300), number, np.float32) for number in range(40)]
        got = await asyncio.gather(*(link.ask("double", values) for values in sent))
        assert all(np.array_equal(value, 2 * values) for value, values in zip(got, sent, strict=True))
        assert link.idle
        link.abort()


async def test_a_frame_larger_than_what_a_socket_takes_at_once_arrives_whole():
    async with replica() as (_, endpoint):
        link = await Link.open(endpoint, LONG_S)
        values = np.arange(3_000_000, dtype=np.int32)
        assert np.array_equal(await link.ask("double", values), 2 * values)
        link.abort()


async def test_a_stream_gives_everything_in_order_and_ends():
    async with replica() as (made, endpoint):
        link = await Link.open(endpoint, LONG_S)
        told = [value async for values in link.stream("count", 100) for value in values]
        assert told == list(range(100))
        assert made.closed == 1
        link.abort()


async def test_what_comes_while_nobody_reads_comes_at_once():
    async with replica() as (_, endpoint):
        link = await Link.open(endpoint, LONG_S)
        async with aclosing(link.stream("count", 50)) as stream:
            first = await anext(stream)
            await asyncio.sleep(0.2)
            rest = await anext(stream)
        assert [*first, *rest] == list(range(50))
        link.abort()


async def test_closing_a_stream_ends_the_call_at_the_replica():
    async with replica() as (made, endpoint):
        link = await Link.open(endpoint, LONG_S)
        stream = link.stream("count", 0)
        waiting = asyncio.ensure_future(anext(stream))
        await until(lambda: made.server.under_way == 1)
        waiting.cancel()
        await asyncio.wait((waiting,))
        await stream.aclose()
        await until(lambda: made.closed == 1 and not made.server.under_way)
        assert link.idle
        link.abort()


async def test_an_exception_at_the_replica_is_a_lost_slot_and_the_connection_goes_on():
    async with replica() as (_, endpoint):
        link = await Link.open(endpoint, LONG_S)
        with pytest.raises(SlotLostError, match="out of order"):
            await link.ask("broken")
        assert await link.ask("double", 21) == 42
        link.abort()


async def test_a_replica_that_is_gone_has_lost_its_calls():
    async with replica() as (made, endpoint):
        link = await Link.open(endpoint, LONG_S)
        held = asyncio.ensure_future(link.ask("held", 1))
        await until(lambda: made.held_now == 1)
        for connection in made.server.connections:
            connection.abort()
        with pytest.raises(SlotLostError, match="ended"):
            await held
        assert link.lost
        with pytest.raises(SlotLostError, match="lost"):
            await link.ask("double", 1)


async def test_a_router_that_is_gone_frees_what_it_had_under_way():
    async with replica() as (made, endpoint):
        link = await Link.open(endpoint, LONG_S)
        held = asyncio.ensure_future(link.ask("held", 1))
        await until(lambda: made.held_now == 1)
        link.abort()
        await until(lambda: made.held_now == 0 and not made.server.under_way)
        with pytest.raises(SlotLostError):
            await held


async def test_a_silent_replica_loses_its_calls_and_is_heard_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.link.ALIVE_EVERY_S", 0.05)
    async with replica() as (made, endpoint):
        link = await Link.open(endpoint, 0.2)
        held = asyncio.ensure_future(link.ask("held", 1))
        # The replica speaks every second, which this link has no patience for.
        with pytest.raises(SlotLostError, match="no word"):
            await held
        assert link.silent
        await until(lambda: not link.silent)
        assert await link.ask("double", 4) == 8
        await until(lambda: made.held_now == 0)
        link.abort()


async def test_closing_a_server_waits_for_what_is_under_way():
    made = Replica()
    link = await Link.open(await made.server.start(HOST), LONG_S)
    held = asyncio.ensure_future(link.ask("held", 7))
    await until(lambda: made.held_now == 1)
    closing = asyncio.ensure_future(made.server.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    made.go.set()
    assert await held == 7
    await closing
    await until(lambda: link.lost)


# Who may call.


async def test_another_secret_is_refused_by_either_side():
    async with replica() as (made, endpoint):
        with pytest.raises(ConnectionError, match="before it proved who it is"):
            await Link.open(replace(endpoint, secret=bytes(32)), LONG_S)
        assert not made.server.connections


@pytest.mark.parametrize(
    "said",
    [
        wire.HEADER.pack(4, wire.Kind.CALL, 1) + b"evil",
        wire.HEADER.pack(32, wire.Kind.PROOF, 0) + bytes(32),
        wire.HEADER.pack(wire.STRANGER_BYTES + 1, wire.Kind.HELLO, 0),
        b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n",
    ],
    ids=["a call", "a guessed proof", "a frame too long", "HTTP"],
)
async def test_a_stranger_is_cut_off_before_anything_of_its_is_read(said: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.wire_server.unpacked", lambda _: pytest.fail("it was read"))
    async with replica() as (made, endpoint):
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        writer.write(said)
        async with asyncio.timeout(LONG_S):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1000)
        writer.close()
        assert not made.server.connections


async def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.wire_server.HANDSHAKE_S", 0.05)
    async with replica() as (_, endpoint):
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        async with asyncio.timeout(LONG_S):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        writer.close()


# Several replicas.


async def test_calls_go_to_whoever_has_the_fewest():
    async with replica() as (one, first), replica() as (two, second):
        links = Links(lambda ids: {id: {"one": first, "two": second}[id] for id in ids}, LONG_S)
        await links.meet(["one", "two"])
        held = []
        for _ in range(6):
            link = links.pick()
            assert link is not None
            held.append(asyncio.ensure_future(link.ask("held", 0)))
            await asyncio.sleep(0)
        await until(lambda: one.held_now + two.held_now == 6)
        assert one.held_now == two.held_now == 3
        one.go.set()
        two.go.set()
        await asyncio.gather(*held)


async def test_load_of_another_router_counts():
    async with replica() as (one, first), replica() as (_, second):

        def find(ids: Any) -> dict[str, Endpoint]:
            return {id: {"one": first, "two": second}[id] for id in ids}

        other, mine = Links(find, LONG_S), Links(find, LONG_S)
        await other.meet(["one"])
        busy = other.pick()
        assert busy is not None
        held = [asyncio.ensure_future(busy.ask("held", 0)) for _ in range(3)]
        await until(lambda: one.held_now == 3)
        await mine.meet(["one", "two"])
        picked = {mine.pick() for _ in range(20)}
        assert len(picked) == 1
        [link] = picked
        assert link is not None
        assert link.load == 0
        one.go.set()
        await asyncio.gather(*held)


async def test_who_leaves_no_note_is_asked_through_ray():
    async with replica() as (_, first):
        links = Links(lambda ids: {"one": first} if "one" in ids else {}, LONG_S)
        assert links.pick() is None
        await links.meet(["two"])
        assert links.pick() is None
        await links.meet(["one", "two"])
        one = links.pick()
        # Both have none: the one that costs less.
        assert one is not None
        held = asyncio.ensure_future(one.ask("held", 0))
        await asyncio.sleep(0)
        assert links.pick() is None
        links.through_ray = 2
        assert links.pick() is one
        held.cancel()


async def test_who_cannot_be_reached_is_asked_through_ray_and_tried_again():
    gone = Replica()
    endpoint = await gone.server.start(HOST)
    await gone.server.close()
    links = Links(lambda ids: dict.fromkeys(ids, endpoint), LONG_S)
    await links.meet(["one"])
    assert links.pick() is None


async def test_who_stops_is_asked_no_more_and_answers_what_it_has():
    async with replica() as (made, endpoint):
        links = Links(lambda ids: dict.fromkeys(ids, endpoint), LONG_S)
        await links.meet(["one"])
        link = links.pick()
        assert link is not None
        held = asyncio.ensure_future(link.ask("held", 5))
        await until(lambda: made.held_now == 1)
        await links.meet([])
        assert links.pick() is None
        made.go.set()
        assert await held == 5
        await links.meet([])
        await until(lambda: link.lost)


async def test_a_lost_connection_is_made_again():
    async with replica() as (made, endpoint):
        links = Links(lambda ids: dict.fromkeys(ids, endpoint), LONG_S)
        await links.meet(["one"])
        for connection in made.server.connections:
            connection.abort()
        await until(lambda: links.pick() is None)
        await links.meet(["one"])
        link = links.pick()
        assert link is not None
        assert await link.ask("double", 2) == 4
