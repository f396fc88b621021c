"""How long before a replica is free its next batch leaves: no longer than it takes, by what came too late before.

Until then rows stay in the queue, where more urgent ones, or those of another key, can still go before them. How late a
batch is when it leaves too late shows nowhere, only that it was; so the lead grows fast then, and shrinks slowly while
batches are in time (as TCP does with its window), and `UP` and `DOWN` say how many may be late: one in about forty.

The service and the planner (`fettle.plan`) use the same. Times are seconds, on any clock.
"""

from __future__ import annotations

from dataclasses import dataclass

# In times of a call: what a batch takes to its replica, and the half of that again for what nobody predicts.
LEAST = 1.5
# On a machine whose cores are all in use a batch may be predicted wrong by a good part of its own time.
MOST = 20.0
UP = 1.5
DOWN = 0.99


@dataclass(slots=True)
class Lead:
    """Of one variant's batches. `calls`: the lead, in times of a call."""

    calls: float = LEAST
    _left: float | None = None

    def seconds(self, call_s: float) -> float:
        return self.calls * call_s

    def left(self, now: float) -> None:
        """A batch that was held back leaves, since a replica was predicted to be free so soon."""
        self._left = now

    def landed(self, now: float, call_s: float, *, held: bool) -> None:
        """A replica has become free. `held`: it has nothing to do, and the batch for it is still held back."""
        if held or (self._left is not None and now - self._left < call_s):
            self.calls = min(MOST, self.calls * UP)
        elif self._left is not None:
            self.calls = max(LEAST, self.calls * DOWN)
        self._left = None
