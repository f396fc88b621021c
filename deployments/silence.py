"""Calls that do not come back: how long to wait for one, and what becomes of it then.

A host that is cut off, or a process that is frozen, says nothing. A call to it is given up, not cancelled, since that
would free its place at the silent replica, and the next call would go there. Knows no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Told = TypeVar("Told")

# What is given up is forgotten after so long at the latest.
HOLD_S = 60.0
# The time is counted in so many parts; a part at whose end there was no replica begins it anew.
PARTS = 4


@dataclass(slots=True)
class Patience:
    """Of the calls to one deployment. `there`: whether it has a replica; time in which it has none is not waited."""

    seconds: float
    there: Callable[[], bool]
    hold_s: float = HOLD_S
    _given_up: set[asyncio.Future[Any]] = field(default_factory=set)

    async def wait(self, call: asyncio.Future[Any]) -> bool:
        """Whether the call ended, in whatever way, in time. If not it goes on, until it ends or is forgotten."""
        left = PARTS
        try:
            while left:
                done, _ = await asyncio.wait((call,), timeout=self._part_s)
                if done:
                    return True
                left = left - 1 if self.there() else PARTS
        except asyncio.CancelledError:
            call.cancel()
            call.add_done_callback(_unheard)
            raise
        self._hold(call)
        return False

    def forget(self) -> None:
        """A replica is gone: it may have been the silent one, so all that was given up is cancelled."""
        for call in list(self._given_up):
            call.cancel()

    @property
    def _part_s(self) -> float | None:
        return None if self.seconds == float("inf") else self.seconds / PARTS

    def _hold(self, call: asyncio.Future[Any]) -> None:
        timer = asyncio.get_running_loop().call_later(self.hold_s, call.cancel)
        self._given_up.add(call)

        def ended(_: asyncio.Future[Any]) -> None:
            timer.cancel()
            self._given_up.discard(call)
            _unheard(call)

        call.add_done_callback(ended)


async def told_regularly(source: AsyncIterator[Told], every_s: float) -> AsyncGenerator[Told | None, None]:
    """The source's own, asked for one by one, and None whenever it had nothing for so long.

    Closing it closes the source.
    """
    call: asyncio.Future[Told | None] | None = None
    try:
        while True:
            call = call or asyncio.ensure_future(next_of(source))
            done, _ = await asyncio.wait((call,), timeout=every_s)
            if not done:
                yield None
                continue
            told, call = call.result(), None
            if told is None:
                return
            yield told
    finally:
        if call is not None:
            call.cancel()
            await asyncio.wait((call,))
            _unheard(call)
        if isinstance(source, AsyncGenerator):
            await source.aclose()


def _unheard(call: asyncio.Future[Any]) -> None:
    """Whatever it had to say, nobody waits for it any more; asyncio need not warn of that."""
    if not call.cancelled():
        call.exception()


async def next_of(source: AsyncIterator[Told]) -> Told | None:
    """What it has next; None at its end."""
    return await anext(source, None)
