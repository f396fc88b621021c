"""The queue before one variant in simulated time: what `deployments.batcher` does, on the same `Queue`.

A batch leaves when there is a place at a replica and one is about to be free; observed times correct the pace. Rows
below INTERACTIVE, deadlines and lost replicas are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fettle.lead import Lead
from fettle.scheduling import BatchBounds, Entry, Queue, Speed, corrected_pace

Later = Callable[[float, Callable[[float], None]], None]


@dataclass(slots=True, eq=False)
class Row(Entry):
    """A row on its way: `parts` of a whole run that it takes here, by stage; `request` whatever it belongs to."""

    parts: tuple[float, ...] = (1.0,)
    request: object = None


class Runs(Protocol):
    """Takes batches to replicas."""

    def __call__(self, station: Station, batch: list[Row], now: float) -> None: ...


@dataclass(slots=True, eq=False)
class Station:
    """See the module. `later(at, what)` calls `what` at a time; `run` takes a batch to a replica."""

    bounds: BatchBounds
    replicas: int
    places: int
    call_s: float
    max_queue_s: float
    later: Later
    run: Runs
    queue: Queue = field(init=False)
    pace: float = 1.0
    rows: int = 0
    batches: int = 0
    lead: Lead = field(default_factory=Lead)
    _taken: int = 0
    _reserving: bool = False
    _back: dict[int, float] = field(default_factory=dict)
    _last_done: float = 0.0
    _turn: int = 0

    def __post_init__(self) -> None:
        self.queue = Queue(self.bounds)

    @property
    def speed(self) -> Speed:
        return Speed(self.pace, self.replicas, self.call_s)

    @property
    def backlog_s(self) -> float:
        return self.speed.seconds(self.queue.work_ms())

    def has_room(self) -> bool:
        return self.queue.has_room("", 1.0, self.max_queue_s * 1000 * self.replicas / self.pace)

    def push(self, row: Row, now: float) -> None:
        self.queue.push(row)
        self._reserve(now)

    def _reserve(self, now: float) -> None:
        if not len(self.queue) or self._reserving or self._taken >= self.replicas * self.places:
            return
        self._reserving = True
        self._taken += 1
        self._wait(now)

    def _wait(self, now: float) -> None:
        """Until a replica is nearly free; whoever lands meanwhile has it looked at again."""
        self._turn += 1
        free_at = self._free_at() - self.lead.seconds(self.call_s)
        if free_at <= now:
            self._leave(now)
            return
        turn = self._turn

        def look(at: float) -> None:
            if self._reserving and turn == self._turn:
                self.lead.left(at)
                self._leave(at)

        self.later(free_at, look)

    def _free_at(self) -> float:
        waiting_at = len(self._back) - self.replicas
        return sorted(self._back.values())[waiting_at] if waiting_at >= 0 else 0.0

    def _leave(self, now: float) -> None:
        self._reserving = False
        taken = self.queue.take(now, self.speed)
        batch = [row for row in taken.batch if isinstance(row, Row)]
        if not batch:
            self._taken -= 1
            return
        work_ms = sum(row.cost_ms for row in batch)
        begins = max(now, self._free_at())
        self._back[id(batch)] = begins + work_ms / 1000 * self.pace + self.call_s
        self.rows += len(batch)
        self.batches += 1
        self._reserve(now)
        self.run(self, batch, now)

    def landed(self, batch: Sequence[Row], taken: float, now: float) -> None:
        """The batch is back; `taken` is when it left."""
        del self._back[id(batch)]
        self.lead.landed(now, self.call_s, held=self._reserving and len(self._back) < self.replicas)
        self._taken -= 1
        began, self._last_done = max(taken, self._last_done), now
        lanes = min(self.speed.replicas, len(self._back) + 1)
        own_ms = max(0.0, now - began - (self.call_s if began == taken else 0.0)) * 1000 * lanes
        self.pace = corrected_pace(self.pace, sum(row.cost_ms for row in batch), own_ms)
        for row in batch:
            self.queue.settle(row)
        if self._reserving:
            self._wait(now)
        else:
            self._reserve(now)
