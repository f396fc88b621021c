"""What an API key's holder may take: requests at a time, and tokens a second with bursts. Pure; the clock is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from fettle.errors import RateLimitedError

# A client that was silent may send so many seconds' worth at once.
BURST_S = 5.0


class Meter(Protocol):
    """Counts by days and months, for quotas."""

    def count(self, requests: int, tokens: int) -> None: ...

    def check(self) -> None: ...


@dataclass(slots=True)
class KeyLimits:
    """One key at one router, which enforces its share of the limits. None means no limit.

    The token bucket may be overdrawn by one request, whose size is known only once it is tokenized; the debt is waited
    off before the next one.
    """

    max_concurrent: int | None = None
    tokens_per_second: float | None = None
    meter: Meter | None = None
    _running: int = 0
    _spent: float = 0.0
    _at: float = 0.0

    def wait_s(self, now: float) -> int | None:
        """None if a request may enter now, else whole seconds after which to come back."""
        if self.max_concurrent is not None and self._running >= self.max_concurrent:
            return 1
        if self.tokens_per_second is None:
            return None
        over = self._level(now) - self.tokens_per_second * BURST_S
        return None if over < 0 else max(1, math.ceil(over / self.tokens_per_second))

    def check(self, name: str, now: float) -> None:
        """Raises RateLimitedError, or QuotaError, which is one, if no request of this key may enter now."""
        if self.meter is not None:
            self.meter.check()
        wait = self.wait_s(now)
        if wait is not None:
            raise RateLimitedError(f"the limits of API key {name!r} are reached; retry in {wait} s", retry_after_s=wait)

    def change(self, new: KeyLimits) -> None:
        """Take over other limits; what runs and was spent stays counted."""
        self.max_concurrent, self.tokens_per_second, self.meter = new.max_concurrent, new.tokens_per_second, new.meter

    def enter(self) -> None:
        self._running += 1
        if self.meter is not None:
            self.meter.count(1, 0)

    def leave(self) -> None:
        self._running -= 1

    def charge(self, tokens: int, now: float) -> None:
        """Count the tokens of a request that entered."""
        self.generated(tokens)
        self._spent, self._at = self._level(now) + tokens, now

    def generated(self, tokens: int) -> None:
        """Count tokens that a request was given, for quotas alone: how many there will be is not known before."""
        if self.meter is not None:
            self.meter.count(0, tokens)

    def _level(self, now: float) -> float:
        """Tokens in the bucket: what was charged, less what has flowed off since."""
        return max(0.0, self._spent - (self.tokens_per_second or 0.0) * (now - self._at))
