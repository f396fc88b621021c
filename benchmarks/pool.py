"""Who sends when: the closed loop and the open loop over keep-alive connections.

Both hand every finished request to a `Recorder`. Neither knows what a request means, prints anything, or starts a
process.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.http1 import Connection, Reply

RECONNECT_AFTER_S = 0.05
LOST = 0  # the status of a request whose connection broke, or that was never answered


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished request: `started` and `ended` on the clock of `perf_counter`."""

    started: float
    ended: float
    status: int
    retry_after: bool


class Recorder:
    """Keeps every sample, and the bodies of the first `keep_bodies` good replies with the time they began."""

    def __init__(self, keep_bodies: int) -> None:
        self.samples: list[Sample] = []
        self.bodies: list[bytes] = []
        self._keep = keep_bodies

    def __call__(self, started: float, reply: Reply | None) -> None:
        ended = time.perf_counter()
        if reply is None:
            self.samples.append(Sample(started, ended, LOST, False))
            return
        self.samples.append(Sample(started, ended, reply.status, b"retry-after" in reply.headers))
        if reply.status == 200 and len(self.bodies) < self._keep:
            self.bodies.append(reply.body)


class Pool:
    """Opens connections and replaces lost ones until it is closed."""

    def __init__(
        self,
        url: str,
        on_ready: Callable[[Connection], None],
        on_reply: Callable[[float, Reply | None], None],
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
    """`connections` clients that each send the next request as soon as they have the answer to the last one."""

    def __init__(self, url: str, requests: Sequence[bytes], connections: int, recorder: Recorder) -> None:
        self._requests = itertools.cycle(requests)
        self._connections = connections
        self._pool = Pool(url, self._send, recorder)

    def start(self) -> None:
        self._pool.open(self._connections)

    def stop(self) -> None:
        """Abandon what is in flight: a closed loop's window counts what finished inside it."""
        self._pool.close()

    def _send(self, connection: Connection) -> None:
        connection.send(next(self._requests))


class OpenLoop:
    """Requests at given times, whatever the server does; their latency counts from the time they were due.

    A due request takes an idle connection or opens one, up to `most_connections`; beyond that it waits here, and
    the wait counts. `lags` holds how late each left, in seconds: large ones mean that this client was too slow.
    """

    def __init__(
        self, url: str, requests: Sequence[bytes], gaps: Iterator[float], most_connections: int, recorder: Recorder
    ) -> None:
        self._requests = itertools.cycle(requests)
        self._gaps = gaps
        self._most = most_connections
        self._recorder = recorder
        self._idle: list[Connection] = []
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._flying = 0
        self._sender: asyncio.Task[None] | None = None
        self.lags: list[float] = []
        self._pool = Pool(url, self._ready, self._answered, self._lost)

    def start(self) -> None:
        self._sender = asyncio.get_running_loop().create_task(self._send_when_due())

    async def drain(self, seconds: float) -> None:
        """Send no more; wait for what is owed, and record as lost what is still owed after `seconds`."""
        if self._sender is not None:
            self._sender.cancel()
        give_up = time.perf_counter() + seconds
        while (self._waiting or self._flying) and time.perf_counter() < give_up:
            await asyncio.sleep(0.01)
        for due, _ in self._waiting:
            self._recorder(due, None)
        self._pool.close()
        await asyncio.sleep(0)  # closing reports every request in flight as lost

    async def _send_when_due(self) -> None:
        due = time.perf_counter()
        while True:
            due += next(self._gaps)
            wait = due - time.perf_counter()
            # Also with nothing to wait for, or a client that is behind would never read a reply.
            await asyncio.sleep(max(wait, 0))
            self._waiting.append((due, next(self._requests)))
            if self._idle:
                self._ready(self._idle.pop())
            elif len(self._pool) < self._most:
                self._pool.open()

    def _ready(self, connection: Connection) -> None:
        if not self._waiting:
            self._idle.append(connection)
            return
        due, request = self._waiting.popleft()
        self.lags.append(time.perf_counter() - due)
        self._flying += 1
        connection.send(request, due)

    def _answered(self, started: float, reply: Reply | None) -> None:
        self._flying -= 1
        self._recorder(started, reply)

    def _lost(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)


def constant_gaps(rate: float) -> Iterator[float]:
    """Seconds between requests at `rate` a second."""
    return itertools.repeat(1 / rate)


def poisson_gaps(rate: float, seed: int) -> Iterator[float]:
    """Exponential gaps: arrivals of independent users at `rate` a second on average."""
    source = random.Random(seed)
    while True:
        yield source.expovariate(rate)
