"""The batches of one variant that are under way, and when each is predicted to be back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from deployments.tickets import Ticket
from fettle.lead import Lead


@dataclass(slots=True, eq=False)
class Flights:
    """A batch departs and lands once. Times are of `time.monotonic`."""

    batches: list[list[Ticket]] = field(default_factory=list)
    lead: Lead = field(default_factory=Lead)
    _back: dict[int, float] = field(default_factory=dict)
    _landed: asyncio.Event = field(default_factory=asyncio.Event)
    _held: bool = False
    _replicas: float = 1
    _call_s: float = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def depart(self, batch: list[Ticket], takes_s: float, replicas: float) -> None:
        """`takes_s`: predicted from when a replica begins with it."""
        begins = max(time.monotonic(), self.free_at(replicas))
        self.batches.append(batch)
        self._back[id(batch)] = begins + takes_s

    def land(self, batch: list[Ticket]) -> None:
        """A second time does nothing."""
        if self._back.pop(id(batch), None) is not None:
            self.batches.remove(batch)
            held = self._held and not self.free_at(self._replicas)
            self.lead.landed(time.monotonic(), self._call_s, held=held)
            self._landed.set()

    def free_at(self, replicas: float) -> float:
        """When a replica is predicted to have nothing more to do; in the past if one has nothing now."""
        waiting_at = len(self._back) - max(1, int(replicas))
        return sorted(self._back.values())[waiting_at] if waiting_at >= 0 else 0.0

    async def nearly_free(self, replicas: float, call_s: float) -> None:
        """Wait until a replica will be free as soon as a batch is there, or one is back before that was predicted."""
        self._replicas, self._call_s = replicas, call_s
        while (early_s := self.free_at(replicas) - self.lead.seconds(call_s) - time.monotonic()) > 0:
            self._landed.clear()
            self._held = True
            try:
                async with asyncio.timeout(early_s):
                    await self._landed.wait()
            except TimeoutError:
                self.lead.left(time.monotonic())
                return
            finally:
                self._held = False
