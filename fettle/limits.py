"""What an API key's holder may take: requests at a time, and tokens a second with bursts. Pure; the clock is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A client that was silent may send so many seconds' worth at once.
BURST_S = 5.0


@dataclass(slots=True)
class KeyLimits:
    """One key at one router, which enforces its share of the limits. None means no limit.

    The token bucket may be overdrawn by one request, whose size is known only once it is tokenized; the debt is waited
    off before the next one.
    """

    max_concurrent: int | None = None
    tokens_per_second: float | None = None
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

    def enter(self) -> None:
        self._running += 1

    def leave(self) -> None:
        self._running -= 1

    def charge(self, tokens: int, now: float) -> None:
        """Count the tokens of a request that entered."""
        self._spent, self._at = self._level(now) + tokens, now

    def _level(self, now: float) -> float:
        """Tokens in the bucket: what was charged, less what has flowed off since."""
        return max(0.0, self._spent - (self.tokens_per_second or 0.0) * (now - self._at))
