"""uvicorn's part in a request and its reply, as the router's requests have it: with less to do.

A reply whose length is known leaves in one piece: one call of the kernel, and one waking of the proxy, for head and
body. uvicorn (0.54) writes a head when it starts and the body when that is there, and uvloop (0.23) hands each write to
the kernel at once. Heads of streams go out at once, as they did.

Requests that are answered in one piece are not watched by Ray, which has two tasks and a queue for each request to
notice a client that leaves (2.60): a header of Ray's own says so, and what answers such a request is cancelled from
here, when uvicorn notices it (`handled`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

from starlette.types import Scope, Send
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# Longer pieces are not copied to be joined.
MOST_JOINED = 1 << 16
# HAProxy takes it out of what clients send (`deployments.haproxy`).
UNWATCHED = (b"x-request-disconnect-disabled", b"?1")
CYCLE = "fettle.cycle"
# What Ray counts a request as whose client has left.
LEFT = 499


class Joined:
    """A transport for one reply. After `hold` one piece waits for the next, for `release` or for `close`."""

    __slots__ = ("_held", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        # None while the piece that will wait is not there yet.
        self._held: bytes | None = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def hold(self) -> None:
        self._held = None

    def write(self, data: bytes) -> None:
        if self._held is None:
            self._held = data
            return
        if self._held and len(data) <= MOST_JOINED:
            data, self._held = self._held + data, b""
        self.release()
        self._transport.write(data)

    def release(self) -> None:
        held, self._held = self._held, b""
        if held:
            self._transport.write(held)

    def close(self) -> None:
        """What waits goes first: whoever breaks off in the middle of a reply had sent its head."""
        self.release()
        self._transport.close()


class Cycle(RequestResponseCycle):
    """One request and its reply, over such a transport. `handler`: the task to cancel if the client leaves."""

    transport: Any
    handler: asyncio.Task[Any] | None = None
    # Paths whose requests Ray need not watch.
    whole: Collection[str] = ()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.transport = Joined(self.transport)
        if self.scope["path"] in self.whole:
            self.scope["headers"].append(UNWATCHED)  # type: ignore[attr-defined]
            self.scope[CYCLE] = self  # type: ignore[literal-required]

    async def send(self, message: Any) -> None:
        starts = not self.response_started
        if starts:
            self.transport.hold()
        await super().send(message)
        # Of a reply to HEAD no body is written, and that of a stream comes when it comes.
        if starts and (self.chunked_encoding is not False or self.scope["method"] == "HEAD"):
            self.transport.release()

    @property
    def disconnected(self) -> bool:
        """Set by uvicorn, where the client left before its reply was complete."""
        return self._left

    @disconnected.setter
    def disconnected(self, left: bool) -> None:
        self._left = left
        if left and self.handler is not None:
            self.handler.cancel()


def lighten(whole: Collection[str]) -> None:
    """Of uvicorn's servers in this process from now on. `whole`: the paths whose requests are answered in one piece.

    Ray makes the router's server, and takes no other class.
    """
    Cycle.whole = frozenset(whole)
    httptools_impl.RequestResponseCycle = Cycle  # type: ignore[misc]


async def handled(scope: Scope, send: Send, work: Coroutine[Any, Any, None]) -> None:
    """Answer a request, unless its client leaves where it is on us to notice that; then the work is cancelled.

    To be awaited by the task that does the work, whichever Ray chose for it.
    """
    # Taken out, since it holds the scope: together they would be left for the collector.
    cycle: Cycle | None = scope.pop(CYCLE, None)
    if cycle is None:
        await work
        return
    cycle.handler = asyncio.current_task()
    try:
        await work
    except asyncio.CancelledError:
        if cycle.disconnected:
            # It goes nowhere, but Ray counts by it.
            await send({"type": "http.response.start", "status": LEFT, "headers": []})
        raise
    finally:
        cycle.handler = None
