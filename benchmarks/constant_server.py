"""A server that is fast and constant: every request is answered after the same time with the same body.

    python -m benchmarks.constant_server PORT [--ms 5]

It takes any path and speaks as much HTTP as a load client needs, so that two clients can be compared on it. A request
that asks for a stream gets `--tokens` events, `--ms` apart.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import re
from functools import partial

import uvloop

BODY = b'{"data": [{"label": "same", "probs": [0.25, 0.75], "embedding": [0.6, 0.8]}]}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


class Constant(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._seconds, self._tokens = seconds, tokens
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        found = LENGTH.search(self._buffer, 0, end)
        size = end + 4 + (int(found[1]) if found else 0)
        if len(self._buffer) < size:
            return
        request, self._buffer = self._buffer[:size], self._buffer[size:]
        answer = partial(self._event, 0) if b'"stream": true' in request else self._answer
        if self._seconds:
            asyncio.get_running_loop().call_later(self._seconds, answer)
        else:
            answer()

    def _answer(self) -> None:
        self._write(HEAD % len(BODY) + BODY)

    def _event(self, number: int) -> None:
        """The first one comes with the head, after the last one the end."""
        last = number == self._tokens - 1
        events = b'data: {"choices": [{"text": " word"}]}\n\n'
        if last:
            events += b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\ndata: [DONE]\n\n' % self._tokens
        chunk = b"%x\r\n%s\r\n" % (len(events), events)
        self._write((STREAM if number == 0 else b"") + chunk + (b"0\r\n\r\n" if last else b""))
        if not last:
            asyncio.get_running_loop().call_later(self._seconds, self._event, number + 1)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def serve(port: int, seconds: float, tokens: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Constant(seconds, tokens), "127.0.0.1", port)
    gc.freeze()
    gc.disable()
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.constant_server")
    parser.add_argument("port", type=int)
    parser.add_argument("--ms", type=float, default=5.0, help="until a reply, and between the events of a stream")
    parser.add_argument("--tokens", type=int, default=8, help="of a stream")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.ms / 1000, options.tokens))


if __name__ == "__main__":
    main()
