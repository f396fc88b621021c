"""What bounds a request while it is under way: its key's limits, its deadline, and how often it is tried."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from types import coroutine
from typing import Any, TypeVar

from fettle.errors import DeadlineError, FettleError, OverloadedError
from fettle.limits import KeyLimits
from fettle.scheduling import NEVER

Result = TypeVar("Result")


def is_retried(error: FettleError) -> bool:
    """Whether the old version may answer what a new one did not: it is not the request's fault, and there is time."""
    return isinstance(error, OverloadedError) or (error.status >= 500 and not isinstance(error, DeadlineError))


@dataclass(frozen=True, slots=True)
class Holding:
    """Count a request of this many tokens against its key's limits, as long as the block runs."""

    limits: KeyLimits
    tokens: int

    def __enter__(self) -> None:
        self.limits.enter()
        self.limits.charge(self.tokens, time.monotonic())

    def __exit__(self, *_: object) -> None:
        self.limits.leave()


@dataclass(frozen=True, slots=True)
class Telling:
    """Tell of an error of ours that leaves the block."""

    tell: Callable[[FettleError], None]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FettleError):
            self.tell(error)


async def before(deadline: float, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives. It is given up at the deadline, a time of `time.monotonic`: its rows leave their queues.

    Raises:
        DeadlineError: it was not there by then.
    """
    if deadline == NEVER:
        return await work
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work
    except TimeoutError:
        raise DeadlineError("not answered before its deadline; allow more time or come back later") from None


async def within(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; no timer is set where that is there at once, as the body of a short request is.

    Raises:
        TimeoutError: the work took longer, and was cancelled.
    """
    try:
        waits_for = work.send(None)
    except StopIteration as done:
        found: Result = done.value
        return found
    async with asyncio.timeout(seconds):
        return await _rest(work, waits_for)


@coroutine
def _rest(work: Coroutine[Any, Any, Result], waits_for: Any) -> Generator[Any, Any, Result]:
    """Work that has begun and waits for something, to its end; what its task is told while it waits it is told."""
    try:
        while True:
            try:
                told = yield waits_for
            except GeneratorExit:
                work.close()
                raise
            except BaseException as error:
                waits_for = work.throw(error)
            else:
                waits_for = work.send(told)
    except StopIteration as done:
        found: Result = done.value
        return found
