"""Who sends when: the closed loop and the open loop over keep-alive connections.

Both hand every finished request to a `Recorder`. Neither knows what a request means, prints anything, or starts a
process.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.http1 import Connection, Reply
from benchmarks.samples import Recorder
from benchmarks.traffic import Request

RECONNECT_AFTER_S = 0.05


@dataclass(frozen=True, slots=True)
class Sent:
    """A request under way; its latency counts from `due`, on the clock of `perf_counter`."""

    due: float
    request: Request


class Pool:
    """Opens connections and replaces lost ones until it is closed."""

    def __init__(
        self,
        url: str,
        on_ready: Callable[[Connection], None],
        on_reply: Callable[[Sent, Reply | None], None],
        on_lost: Callable[[Connection], None] | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._on_ready, self._on_reply, self._on_user_lost = on_ready, on_reply, on_lost
        self._alive: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def open(self, connections: int = 1) -> None:
        for _ in range(connections):
            task = asyncio.get_running_loop().create_task(self._connect())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def __len__(self) -> int:
        """Connections that are open or being opened."""
        return len(self._alive) + len(self._tasks)

    def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for connection in list(self._alive):
            connection.close()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closed:
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(self._on_ready, self._on_reply, self._on_lost), *self._address
                )
            except OSError:
                await asyncio.sleep(RECONNECT_AFTER_S)
                continue
            if connection.is_open:  # it may have come and gone already
                self._alive.add(connection)
            return

    def _on_lost(self, connection: Connection) -> None:
        self._alive.discard(connection)
        if self._on_user_lost is not None:
            self._on_user_lost(connection)
        if not self._closed:
            self.open()


class ClosedLoop:
    """`connections` clients that each send the next request as soon as they have the answer to the last one.

    `done` is set when the requests have come to an end, if they ever do, and every one of them has ended too.
    """

    def __init__(self, url: str, requests: Iterator[Request], connections: int, recorder: Recorder) -> None:
        self._requests = requests
        self._connections = connections
        self._recorder = recorder
        self._flying = 0
        self._pool = Pool(url, self._send, self._answered)
        self.done = asyncio.Event()

    def start(self) -> None:
        self._pool.open(self._connections)

    def stop(self) -> None:
        """Abandon what is in flight: a closed loop's window counts what finished inside it."""
        self._pool.close()

    def _send(self, connection: Connection) -> None:
        request = next(self._requests, None)
        if request is not None:
            self._flying += 1
            connection.send(request.data, Sent(time.perf_counter(), request))
        elif not self._flying:
            self.done.set()

    def _answered(self, sent: Sent, reply: Reply | None) -> None:
        self._flying -= 1
        self._recorder(sent.due, time.perf_counter(), sent.request, reply)


class OpenLoop:
    """Requests at given times, whatever the server does; their latency counts from the time they were due.

    `schedule` has requests with their seconds after the start. A due request takes an idle connection or opens one, up
    to `most_connections`; beyond that it waits here, and the wait counts. `lags` holds how late each left, in seconds:
    large ones mean that this client was too slow.
    """

    def __init__(
        self, url: str, schedule: Iterator[tuple[float, Request]], most_connections: int, recorder: Recorder
    ) -> None:
        self._schedule = schedule
        self._most = most_connections
        self._recorder = recorder
        self._idle: list[Connection] = []
        self._waiting: deque[Sent] = deque()
        self._flying = 0
        self._sender: asyncio.Task[None] | None = None
        self.lags: list[float] = []
        self._pool = Pool(url, self._ready, self._answered, self._lost)

    def start(self) -> None:
        self._sender = asyncio.get_running_loop().create_task(self._send_when_due(time.perf_counter()))

    async def drain(self, seconds: float) -> None:
        """Send no more; wait for what is owed, and record as lost what is still owed after `seconds`."""
        if self._sender is not None:
            self._sender.cancel()
        give_up = time.perf_counter() + seconds
        while (self._waiting or self._flying) and time.perf_counter() < give_up:
            await asyncio.sleep(0.01)
        for sent in self._waiting:
            self._recorder(sent.due, time.perf_counter(), sent.request, None)
        self._pool.close()
        await asyncio.sleep(0)  # closing reports every request in flight as lost

    async def _send_when_due(self, start: float) -> None:
        for second, request in self._schedule:
            wait = start + second - time.perf_counter()
            # Also with nothing to wait for, or a client that is behind would never read a reply.
            await asyncio.sleep(max(wait, 0))
            self._waiting.append(Sent(start + second, request))
            if self._idle:
                self._ready(self._idle.pop())
            elif len(self._pool) < self._most:
                self._pool.open()

    def _ready(self, connection: Connection) -> None:
        if not self._waiting:
            self._idle.append(connection)
            return
        sent = self._waiting.popleft()
        self.lags.append(time.perf_counter() - sent.due)
        self._flying += 1
        connection.send(sent.request.data, sent)

    def _answered(self, sent: Sent, reply: Reply | None) -> None:
        self._flying -= 1
        self._recorder(sent.due, time.perf_counter(), sent.request, reply)

    def _lost(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
