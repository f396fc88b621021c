"""A replica's side of the wire: calls of its methods, each a task of its own, until they are over or nobody wants them.

It says every second that it is there, whatever it is at, so that silence means something. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from deployments.wire import (
    ALIVE_EVERY_S,
    HANDSHAKE_S,
    MOST_BYTES,
    NONCE_BYTES,
    OTHERS,
    REPLICA,
    ROUTER,
    Endpoint,
    Frames,
    Kind,
    packed,
    proof,
    proves,
    unpacked,
)

logger = logging.getLogger("ray.serve.fettle")

Answers = Mapping[str, Callable[..., Awaitable[Any]]]
Streams = Mapping[str, Callable[..., AsyncGenerator[Any, None]]]


class WireServer:
    """The replica's side: `start`, then its methods are called, until `close`.

    Args:
        answers: by name, what gives one value.
        streams: by name, what gives several; it is closed when the caller wants no more.
    """

    def __init__(self, answers: Answers | None = None, streams: Streams | None = None) -> None:
        self.answers, self.streams = answers or {}, streams or {}
        self.secret = secrets.token_bytes(32)
        self.connections: set[_Served] = set()
        self._server: asyncio.Server | None = None
        self._idle = asyncio.Event()

    @property
    def under_way(self) -> int:
        """Calls, of all connections."""
        return sum(len(each.tasks) for each in self.connections)

    async def start(self, host: str) -> Endpoint:
        """Listen on any port of `host`. Raises OSError where it cannot."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Served(self), host, 0)
        return Endpoint(host, self._server.sockets[0].getsockname()[1], self.secret)

    async def close(self) -> None:
        """Take no new connections, wait for what is under way, then leave."""
        if self._server is not None:
            self._server.close()
        while self.under_way:
            self._idle.clear()
            await self._idle.wait()
        for connection in list(self.connections):
            connection.abort()

    def ended(self) -> None:
        """A call is over."""
        self._idle.set()


class _Served(Frames):
    """A router's connection, at the replica."""

    def __init__(self, server: WireServer) -> None:
        super().__init__()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._server = server
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._timer = self._loop.call_later(HANDSHAKE_S, self.abort)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        self._timer.cancel()
        self._server.connections.discard(self)
        for task in self.tasks.values():
            task.cancel()
        self._server.ended()

    def frame(self, kind: int, call: int, payload: bytes) -> None:
        proven = self in self._server.connections
        match kind:
            case Kind.CALL if proven:
                task = self.tasks[call] = self._loop.create_task(self._call(call, payload))
                task.add_done_callback(lambda _: self._over(call))
            case Kind.CANCEL if proven:
                if call in self.tasks:
                    self.tasks[call].cancel()
            case Kind.HELLO if not proven:
                self.send(Kind.HELLO, payload=self._nonce + proof(self._server.secret, REPLICA, payload))
            case Kind.PROOF if not proven and proves(payload, self._server.secret, ROUTER, self._nonce):
                self._timer.cancel()
                self._most = MOST_BYTES
                self._server.connections.add(self)
                self._say_alive()
            case _:
                self.abort()

    def _say_alive(self) -> None:
        self.send(Kind.ALIVE, payload=self._others())
        self._timer = self._loop.call_later(ALIVE_EVERY_S, self._say_alive)

    def _others(self) -> bytes:
        """How many calls of other routers are under way."""
        return OTHERS.pack(self._server.under_way - len(self.tasks))

    def _over(self, call: int) -> None:
        del self.tasks[call]
        self._server.ended()

    async def _call(self, call: int, payload: bytes) -> None:
        try:
            method, arguments = unpacked(payload)
            if (answer := self._server.answers.get(method)) is not None:
                value = await answer(*arguments)
                self.send(Kind.ANSWER, call, self._others() + packed(value))
                return
            async with aclosing(self._server.streams[method](*arguments)) as items:
                async for item in items:
                    self.send(Kind.ITEM, call, packed(item))
            self.send(Kind.END, call, self._others())
        except Exception as error:
            # What is wrong with a call is a value of its own; this is a bug, or a device that is gone.
            logger.exception("a call over the wire failed")
            self.send(Kind.FAILED, call, repr(error).encode())
