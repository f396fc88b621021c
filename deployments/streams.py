"""Replies that go out piece by piece, and clients that leave before they are whole.

Nothing is buffered: the next block is asked for when the server has taken the last one, so a client that reads slowly
slows whatever makes the blocks, and what the server itself holds is bounded by its write buffer. One that reads hardly
at all is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import orjson
from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
# Whoever takes none of the 64 kB that the server holds for it in so long a time is given up, and with it its place at a
# replica, which nobody else can have until then.
STALLED_S = 30.0


def event(content: object) -> bytes:
    """A server-sent event that holds JSON."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


@asynccontextmanager
async def connected(receive: Receive) -> AsyncIterator[None]:
    """A block that ends at once when the client leaves. The body must have been read before.

    Raises:
        ClientDisconnect: it left.
    """
    task = asyncio.current_task()
    assert task is not None
    before, gone = task.cancelling(), False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # As asyncio's own time limits do it: somebody else's cancellation goes on.
        if gone and task.uncancel() <= before:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


class EventStream(Response):
    """Server-sent events. `events` are whole ones, several in one block where they belong together.

    Both they and the `source` that they are made from are closed at the end, whatever the end is.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], source: AsyncGenerator[Any, None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        # Events that were never asked for would not close it.
        self._source = source
        # Proxies hold replies back otherwise.
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            async with aclosing(self._source), aclosing(self._events), connected(receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for block in self._events:
                    async with asyncio.timeout(STALLED_S):
                        await send(_body(block, more=True))
                await send(_body(b"", more=False))
        except (ClientDisconnect, OSError):
            # Nobody reads on, TimeoutError included; what was under way is closed.
            return


def _body(block: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": block, "more_body": more}
