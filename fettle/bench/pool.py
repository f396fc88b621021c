"""Who sends when: the closed loop and the open loop over keep-alive connections.

Both hand every finished request to a `Recorder`. Neither knows what a request means, prints anything, or starts a
process.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from fettle.bench.http1 import Connection, Reply, Turns
from fettle.bench.samples import Recorder
from fettle.bench.sse import Stream
from fettle.bench.traffic import Request

RECONNECT_AFTER_S = 0.05


@dataclass(slots=True, eq=False)
class Sent:
    """A request under way; its latency counts from `due`, on the clock of `perf_counter`. `stream`: of its text."""

    due: float
    request: Request
    sent: float = 0.0
    stream: Stream | None = None

    def leave(self, connection: Connection) -> None:
        """Write it."""
        self.sent = time.perf_counter()
        connection.send(self.request.data, self, None if self.stream is None else self.stream.feed)


class Pool:
    """Opens connections and replaces lost ones until it is closed; `failed` counts those that could not be opened."""

    def __init__(
        self,
        url: str,
        on_ready: Callable[[Connection], None],
        on_reply: Callable[[Sent, Reply | None, float], None],
        on_lost: Callable[[Connection], None] | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname or "127.0.0.1", parts.port or (443 if self._tls else 80))
        self.failed: Counter[str] = Counter()
        self._on_ready, self._on_reply, self._on_user_lost = on_ready, on_reply, on_lost
        self._alive: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._turns = Turns()

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
                    lambda: Connection(self._on_ready, self._on_reply, self._on_lost, self._turns),
                    *self._address,
                    ssl=self._tls,
                )
            except OSError as error:
                self.failed[type(error).__name__] += 1
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

    def __init__(
        self, url: str, requests: Iterator[Request], connections: int, recorder: Recorder, *, streams: bool = False
    ) -> None:
        self._requests = requests
        self._connections = connections
        self._recorder = recorder
        self._streams = streams
        self.flying = 0
        self.pool = Pool(url, self._send, self._answered)
        self.done = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Nothing waits in a closed loop."""
        return 0

    def start(self, at: float) -> None:
        """`at` a time of `perf_counter`."""
        asyncio.get_running_loop().call_later(max(0.0, at - time.perf_counter()), self.pool.open, self._connections)

    async def drain(self, seconds: float) -> None:
        """Abandon what is in flight, since the window counts what finished inside it; but texts have tokens inside."""
        self._requests = iter(())
        give_up = time.perf_counter() + seconds
        while self._streams and self.flying and time.perf_counter() < give_up:
            await asyncio.sleep(0.01)
        self.pool.close()

    def _send(self, connection: Connection) -> None:
        request = next(self._requests, None)
        if request is not None:
            self.flying += 1
            Sent(time.perf_counter(), request, stream=Stream() if self._streams else None).leave(connection)
        elif not self.flying:
            self.done.set()

    def _answered(self, sent: Sent, reply: Reply | None, at: float) -> None:
        self.flying -= 1
        self._recorder(sent.due, sent.sent, at, sent.request, reply, sent.stream)


class OpenLoop:
    """Requests at given times, whatever the server does; their latency counts from the time they were due.

    `schedule` has requests with their seconds after the start. A due request takes an idle connection or opens one, up
    to `most_connections`; beyond that it waits here, and the wait counts. `lags` holds how late each was put on its
    way, in seconds: large ones mean that this client was too slow. `done` is set at the end of the schedule.
    """

    def __init__(
        self,
        url: str,
        schedule: Iterator[tuple[float, Request]],
        most_connections: int,
        recorder: Recorder,
        *,
        streams: bool = False,
    ) -> None:
        self._schedule = schedule
        self._most = most_connections
        self._recorder = recorder
        self._streams = streams
        self._idle: list[Connection] = []
        self._queue: deque[Sent] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._draining = ""
        self.flying = 0
        self.lags: list[float] = []
        self.full = 0
        self.pool = Pool(url, self._ready, self._answered, self._lost)
        self.done = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Due requests without a connection."""
        return len(self._queue)

    def start(self, at: float) -> None:
        """`at` a time of `perf_counter`."""
        self._sender = asyncio.get_running_loop().create_task(self._send_when_due(at))

    async def drain(self, seconds: float) -> None:
        """Send no more; wait for what is owed, and record as lost what is still owed after `seconds`."""
        if self._sender is not None:
            self._sender.cancel()
        give_up = time.perf_counter() + seconds
        while (self._queue or self.flying) and time.perf_counter() < give_up:
            await asyncio.sleep(0.01)
        for sent in self._queue:
            self._recorder(sent.due, sent.due, time.perf_counter(), sent.request, None, None, "never sent")
        self._draining = "no answer in time"
        self.pool.close()
        await asyncio.sleep(0)  # closing reports every request in flight as lost

    async def _send_when_due(self, start: float) -> None:
        for second, request in self._schedule:
            wait = start + second - time.perf_counter()
            # Also with nothing to wait for, or a client that is behind would never read a reply.
            await asyncio.sleep(max(wait, 0))
            # The loop's timers are of whole milliseconds and may be early; then the request was due as it left.
            now = time.perf_counter()
            due = min(start + second, now)
            self.lags.append(now - due)
            self._queue.append(Sent(due, request, stream=Stream() if self._streams else None))
            if self._idle:
                self._ready(self._idle.pop())
            elif len(self.pool) < self._most:
                self.pool.open()
            else:
                self.full += 1
        self.done.set()

    def _ready(self, connection: Connection) -> None:
        if not self._queue:
            self._idle.append(connection)
            return
        self.flying += 1
        self._queue.popleft().leave(connection)

    def _answered(self, sent: Sent, reply: Reply | None, at: float) -> None:
        self.flying -= 1
        problem = self._draining or "connection broke"
        self._recorder(sent.due, sent.sent, at, sent.request, reply, sent.stream, problem)

    def _lost(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
