"""What bounds a request while it is under way: its key's limits, its deadline, and how often it is tried."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fettle.errors import DeadlineError, FettleError, OverloadedError
from fettle.limits import KeyLimits
from fettle.scheduling import NEVER


def is_retried(error: FettleError) -> bool:
    """Whether the old version may answer what a new one did not: it is not the request's fault, and there is time."""
    return isinstance(error, OverloadedError) or (error.status >= 500 and not isinstance(error, DeadlineError))


@contextmanager
def holding(limits: KeyLimits, tokens: int) -> Iterator[None]:
    """Count a request of this many tokens against its key's limits."""
    limits.enter()
    limits.charge(tokens, time.monotonic())
    try:
        yield
    finally:
        limits.leave()


@asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """Give up at the deadline, a time of `time.monotonic`: rows that still wait leave their queues."""
    if deadline == NEVER:
        yield
        return
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError:
        raise DeadlineError("not answered before its deadline; allow more time or come back later") from None
