"""A router's side of the wire: one connection to a replica, and the calls that are under way on it.

A replica that is gone, or falls silent, has lost its calls, and the caller does them again elsewhere. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deployments.slots import SlotLostError
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


@dataclass(slots=True, eq=False)
class _Pending:
    """A call that was sent: what came of it and was not read yet."""

    items: deque[Any] = field(default_factory=deque)
    over: bool = False
    error: SlotLostError | None = None
    reader: asyncio.Future[None] | None = None

    def tell(self) -> None:
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    async def news(self) -> None:
        """Wait until there is something. Raises SlotLostError if nothing more comes."""
        while not self.items and not self.over:
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        if self.error is not None and not self.items:
            raise self.error


class Link(Frames):
    """The router's side of one connection. `open` makes it."""

    def __init__(self, endpoint: Endpoint, silent_after_s: float) -> None:
        super().__init__()
        self.silent = False
        self.lost = False
        self._endpoint = endpoint
        self._silent_after_s = silent_after_s
        self._unheard_s = 0.0
        self._others = 0
        self._calls: dict[int, _Pending] = {}
        self._made = 0
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._ready = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, endpoint: Endpoint, silent_after_s: float) -> Link:
        """Connect. Raises OSError (TimeoutError among them) where there is no such replica to be reached."""
        loop = asyncio.get_running_loop()
        link: Link | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                _, link = await loop.create_connection(
                    lambda: cls(endpoint, silent_after_s), endpoint.host, endpoint.port
                )
                await link._ready
        except BaseException:
            if link is not None:
                link.abort()
            raise
        return link

    @property
    def load(self) -> int:
        """Calls at the replica, those of other routers as they were when it last said something."""
        return len(self._calls) + self._others

    @property
    def idle(self) -> bool:
        """No call of ours is under way."""
        return not self._calls

    async def ask(self, method: str, *arguments: Any) -> Any:
        """The one value that a method gives. Raises SlotLostError: the replica is gone, or silent."""
        with self._called(method, arguments) as pending:
            await pending.news()
            return pending.items.popleft()

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[list[Any], None]:
        """What a method gives, all that came since it was last asked for; closing it ends the call there.

        Raises SlotLostError: as `ask`.
        """
        with self._called(method, arguments) as pending:
            while True:
                await pending.news()
                if not pending.items:
                    return
                items, pending.items = list(pending.items), deque()
                yield items

    @contextmanager
    def _called(self, method: str, arguments: tuple[Any, ...]) -> Iterator[_Pending]:
        """A call, until nobody waits for it any more."""
        if self.lost:
            raise SlotLostError("the connection to the replica is lost")
        self._made += 1
        call, pending = self._made, _Pending()
        self._calls[call] = pending
        self.send(Kind.CALL, call, packed((method, arguments)))
        try:
            yield pending
        finally:
            if self._calls.pop(call, None) is not None and not pending.over:
                self.send(Kind.CANCEL, call)

    # What comes.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(Kind.HELLO, payload=self._nonce)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._timer is not None:
            self._timer.cancel()
        if not self._ready.done():
            self._ready.set_exception(ConnectionError("it closed the connection before it proved who it is"))
        self._fail(SlotLostError(f"the connection to the replica ended: {error!r}"))

    def frame(self, kind: int, call: int, payload: bytes) -> None:
        self._unheard_s, self.silent = 0.0, False
        match kind:
            case Kind.HELLO if not self._ready.done():
                nonce, told = payload[:NONCE_BYTES], payload[NONCE_BYTES:]
                if not proves(told, self._endpoint.secret, REPLICA, self._nonce):
                    self.abort()
                    return
                self._most = MOST_BYTES
                self.send(Kind.PROOF, payload=proof(self._endpoint.secret, ROUTER, nonce))
            case Kind.ALIVE if self._most == MOST_BYTES:
                [self._others] = OTHERS.unpack(payload)
                if not self._ready.done():
                    self._ready.set_result(None)
                    self._listen()
            case _ if self._ready.done():
                self._told(kind, call, payload)
            case _:
                self.abort()

    def _told(self, kind: int, call: int, payload: bytes) -> None:
        # What nobody waits for any more comes a while longer.
        pending = self._calls.get(call)
        if kind in (Kind.ANSWER, Kind.END):
            [self._others] = OTHERS.unpack_from(payload)
        if pending is None:
            return
        match kind:
            case Kind.ITEM:
                pending.items.append(unpacked(payload))
            case Kind.ANSWER:
                pending.items.append(unpacked(memoryview(payload)[OTHERS.size :]))
                pending.over = True
            case Kind.END:
                pending.over = True
            case Kind.FAILED:
                pending.over = True
                pending.error = SlotLostError(payload.decode())
        pending.tell()

    def _listen(self) -> None:
        """Counted in turns of this loop, not by a clock: where we were away ourselves, nobody was silent."""
        if self._unheard_s >= self._silent_after_s and not self.silent:
            self.silent = True
            self._fail(SlotLostError(f"no word from the replica in {self._unheard_s:g} s"))
        self._unheard_s += ALIVE_EVERY_S
        self._timer = self._loop.call_later(ALIVE_EVERY_S, self._listen)

    def _fail(self, error: SlotLostError) -> None:
        calls, self._calls = self._calls, {}
        for call, pending in calls.items():
            # Should it come back to life, it need not go on.
            self.send(Kind.CANCEL, call)
            pending.over, pending.error = True, error
            pending.tell()
