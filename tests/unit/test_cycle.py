"""What a client gets is what uvicorn would have sent it, in fewer pieces; and nobody works on for one that has left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from deployments import cycle
from deployments.cycle import LEFT, MOST_JOINED, UNWATCHED, Cycle, handled, lighten

pytestmark = pytest.mark.anyio

WHOLE = "/classify"
POST = b"POST /classify HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httptools_impl, "RequestResponseCycle", RequestResponseCycle)
    monkeypatch.setattr(Cycle, "whole", frozenset())


class Transport(asyncio.Transport):
    """Remembers what was written, and `None` for the close."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes | None] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.written.append(None)

    def is_closing(self) -> bool:
        return None in self.written

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Connection:
    """A client's connection to uvicorn, which has no socket."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, lifespan="off", log_config=None, http="httptools")
        config.load()
        self.state = ServerState()
        self.transport = Transport()
        self.protocol = HttpToolsProtocol(config, self.state, {})
        self.protocol.connection_made(self.transport)

    async def send(self, request: bytes) -> list[bytes | None]:
        self.protocol.data_received(request)
        await self.settled()
        return self.transport.written

    async def settled(self) -> None:
        while self.state.tasks:
            await asyncio.sleep(0)


def replying(headers: list[tuple[bytes, bytes]], *pieces: bytes, breaks: bool = False) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if breaks:
            raise ValueError("broken off")
        for number, piece in enumerate(pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})

    return app


async def waiting(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, which has to be asked for."""
    await receive()
    await replying(length(2), b"{}")(scope, receive, send)


def length(number: int) -> list[tuple[bytes, bytes]]:
    return [(b"x-a", b"b"), (b"content-length", b"%d" % number)]


CASES = {
    "one piece": (replying(length(2), b"{}"), POST, 1),
    "nothing": (replying(length(0), b""), POST, 1),
    "two pieces": (replying(length(4), b"{}", b"[]"), POST, 2),
    "much": (replying(length(MOST_JOINED + 1), b"a" * (MOST_JOINED + 1)), POST, 2),
    "stream": (replying([], b"a", b"b"), POST, 3),
    "head": (replying(length(2), b""), b"HEAD /classify HTTP/1.1\r\nhost: a\r\n\r\n", 1),
    "stream of no length in HTTP/1.0": (replying([], b"a"), b"GET / HTTP/1.0\r\n\r\n", 3),
    "last of a connection": (replying([*length(2), (b"connection", b"close")], b"{}"), POST, 2),
    "two after one another": (replying(length(2), b"{}"), POST + POST, 2),
    "broken off": (replying(length(2), b"{}", breaks=True), POST, 2),
    "a body that is asked for": (waiting, POST.replace(b"host: a", b"expect: 100-continue"), 2),
}


@pytest.mark.parametrize("name", CASES)
async def test_the_same_bytes_in_fewer_pieces(name):
    app, request, most = CASES[name]
    wanted = await Connection(app).send(request)
    lighten(())
    got = await Connection(app).send(request)
    assert b"".join(each for each in got if each) == b"".join(each for each in wanted if each)
    assert (None in got) == (None in wanted)
    assert None not in got[:-1]
    assert len(got) == most <= len(wanted)


async def test_what_a_stream_begins_with_is_there_before_its_first_piece():
    lighten(())
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"a"})

    connection = Connection(app)
    connection.protocol.data_received(POST)
    await asyncio.sleep(0)
    assert b"".join(connection.transport.written).endswith(b"\r\n\r\n")
    go_on.set()
    await connection.settled()


class Handler:
    """An application that works until it is cancelled, below what Ray has around it: nothing, or a task of its own."""

    def __init__(self, *, own_task: bool) -> None:
        self.own_task = own_task
        self.scopes: list[dict[str, Any]] = []
        self.told: list[int] = []
        self.ended: list[str] = []
        self.release = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(dict(scope))

        async def tell(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.told.append(message["status"])
            await send(message)

        work = handled(scope, tell, self.work(receive, tell))
        if self.own_task:
            task = asyncio.create_task(work)
            await asyncio.wait([task])
            work = task
        try:
            await work
        except asyncio.CancelledError:
            # As Ray does with those of its direct ingress.
            self.ended.append("cancelled")
        else:
            self.ended.append("done")

    async def work(self, receive: Any, send: Any) -> None:
        await receive()
        await self.release.wait()
        await replying(length(2), b"{}")({}, receive, send)


@pytest.mark.parametrize("own_task", [False, True])
async def test_who_leaves_is_not_worked_for(own_task):
    lighten([WHOLE])
    handler = Handler(own_task=own_task)
    connection = Connection(handler)
    connection.protocol.data_received(POST)
    for _ in range(5):
        await asyncio.sleep(0)
    assert handler.ended == []
    connection.protocol.connection_lost(None)
    async with asyncio.timeout(5):
        await connection.settled()
    assert (handler.ended, handler.told) == (["cancelled"], [LEFT])
    assert connection.transport.written in ([], [None])


@pytest.mark.parametrize("own_task", [False, True])
async def test_who_leaves_after_the_reply_or_between_two_disturbs_nobody(own_task):
    lighten([WHOLE])
    handler = Handler(own_task=own_task)
    handler.release.set()
    connection = Connection(handler)
    await connection.send(POST)
    await connection.send(POST)
    connection.protocol.connection_lost(None)
    await asyncio.sleep(0)
    assert (handler.ended, handler.told) == (["done"] * 2, [200] * 2)


async def test_only_what_is_answered_in_one_piece_is_not_watched_by_ray():
    lighten([WHOLE])
    handler = Handler(own_task=False)
    handler.release.set()
    connection = Connection(handler)
    await connection.send(POST)
    await connection.send(POST.replace(b"/classify", b"/v1/completions"))
    own, others = handler.scopes
    assert UNWATCHED in own["headers"]
    assert cycle.CYCLE in own
    assert UNWATCHED not in others["headers"]
    assert cycle.CYCLE not in others


async def test_ray_knows_the_header():
    from ray.serve._private.http_util import parse_disconnect_disabled_header

    assert parse_disconnect_disabled_header(dict([UNWATCHED]))
