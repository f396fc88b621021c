"""The least HTTP/1.1 that a load client needs: a reply parser and a keep-alive connection.

One request in flight per connection, bodies by Content-Length, chunked or until the connection closes. No redirects,
no pipelining, no compression. Callbacks rather than tasks, since the client shares its cores with the
server that it measures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole reply; `headers` has lower-case names."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class ReplyParser:
    """Bytes in, replies out; holds one unfinished reply. `on_piece` hears each chunk of a chunked 200 as it comes."""

    def __init__(self) -> None:
        self.on_piece: Callable[[bytes], None] | None = None
        self._buffer = bytearray()
        self._status = 0
        self._headers: dict[bytes, bytes] | None = None
        self._length: int | None = None
        self._chunks: list[bytes] = []

    def feed(self, data: bytes) -> Reply | None:
        """Take what arrived; returns the reply when it is whole.

        Raises:
            ValueError: not HTTP/1.1.
        """
        self._buffer += data
        if self._headers is None and not self._read_head():
            return None
        if self._length is not None:
            return self._take(self._length) if len(self._buffer) >= self._length else None
        return self._read_chunks() if self._chunked else None

    def finish(self) -> Reply | None:
        """The connection closed: a body without a length ends here; anything else was cut off."""
        if self._headers is None or self._length is not None or self._chunked:
            return None
        return self._take(len(self._buffer))

    @property
    def _chunked(self) -> bool:
        return self._headers is not None and b"chunked" in self._headers.get(b"transfer-encoding", b"")

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        if not first.startswith(b"HTTP/1."):
            raise ValueError(f"not an HTTP/1 reply: {first[:40]!r}")
        self._status = int(first[9:12])
        pairs = (line.partition(b":") for line in lines)
        self._headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        length = self._headers.get(b"content-length")
        self._length = 0 if self._status in (204, 304) else int(length) if length is not None else None
        del self._buffer[: end + 4]
        return True

    def _read_chunks(self) -> Reply | None:
        while (line := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:line].split(b";")[0], 16)
            end = line + 2 + size + 2
            if len(self._buffer) < end:
                return None
            if size == 0:
                del self._buffer[:end]
                return self._take(0)
            piece = bytes(self._buffer[line + 2 : end - 2])
            self._chunks.append(piece)
            del self._buffer[:end]
            if self.on_piece is not None and self._status == 200:
                self.on_piece(piece)
        return None

    def _take(self, length: int) -> Reply:
        body = b"".join(self._chunks) + bytes(self._buffer[:length])
        reply = Reply(self._status, self._headers or {}, body)
        del self._buffer[:length]
        self._headers, self._length, self._chunks = None, None, []
        return reply


class Turns:
    """When the loop found readable what it has read out since: one time for all, whoever's turn comes first or last.

    Replies that come together are parsed one after the other, which is this client's time and not the server's.
    """

    def __init__(self) -> None:
        self._at: float | None = None

    def began(self) -> float:
        """Of this turn of the running loop, on the clock of `perf_counter`."""
        if self._at is None:
            self._at = time.perf_counter()
            # Comes after all that can be read in this turn.
            asyncio.get_running_loop().call_soon(self._end)
        return self._at

    def _end(self) -> None:
        self._at = None


class Connection(asyncio.Protocol):
    """A keep-alive connection that says when it is ready, what came back, and when it is lost.

    `on_ready(connection)`: it may send. `on_reply(ticket, reply, at)`: `ticket` is what `send` was given; `reply` is
    None if the connection broke before the reply was whole; `at` when its end came. `on_lost(connection)` comes once,
    at the end.
    """

    def __init__(
        self,
        on_ready: Callable[[Connection], None],
        on_reply: Callable[[Any, Reply | None, float], None],
        on_lost: Callable[[Connection], None],
        turns: Turns,
    ) -> None:
        self._turns = turns
        self._on_ready, self._on_reply, self._on_lost = on_ready, on_reply, on_lost
        self._parser = ReplyParser()
        self._transport: asyncio.Transport | None = None
        self._ticket: Any = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    def send(self, request: bytes, ticket: Any, on_piece: Callable[[bytes], None] | None = None) -> None:
        """Write one request; `ticket`, which is not None, comes back with its reply. `on_piece`: see `ReplyParser`."""
        if self._transport is None or self._ticket is not None:
            raise RuntimeError("send() on a connection that is not ready")
        self._ticket = ticket
        self._parser.on_piece = on_piece
        self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is no subclass of it
        self._on_ready(self)

    def data_received(self, data: bytes) -> None:
        at = self._turns.began()
        reply = self._parser.feed(data)
        if reply is None or self._ticket is None:
            return
        self._answer(reply, at)
        if reply.headers.get(b"connection", b"").lower() == b"close":
            self.close()
        elif self._transport is not None and not self._transport.is_closing():
            self._on_ready(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = None
        if self._ticket is not None:
            self._answer(self._parser.finish(), time.perf_counter())
        self._on_lost(self)

    def _answer(self, reply: Reply | None, at: float) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._on_reply(ticket, reply, at)
