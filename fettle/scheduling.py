"""Who goes next: the rows that wait for one variant, by deadline, shared fairly between keys, in batches that fit.

Pure policy: the clock is given, nothing sleeps, no row is run. The router's batcher and the simulation of it
(`benchmarks.simulation`) hold the same `Queue`. Times are in seconds, predicted work in ms of the latency table.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

NEVER = math.inf
# A key may be this share of a batch ahead of the one that was served least, so that order within a batch can follow
# deadlines; with a whole batch, a flood of older rows would fill the batch before another key's first row.
SLACK = 0.25
# What a key was served is forgotten with this time constant. So long, at most, one that takes less than its share has
# its bursts served before others, and one that comes new before one that has had the replicas to itself.
FORGET_S = 1.0
NOTHING_MS = 1e-3
# A promise counts with so many times the predicted work: rows that leave early, or late, make the time of those before
# one uncertain, and a place that was refused in vain goes to the next who asks, while one that is lost goes to nobody.
PROMISED = 1.15
# So many of the waiting rows tell what a full batch costs.
BUDGET_SAMPLE = 32


class Priority(IntEnum):
    """Lower goes first, always. SHADOW is the monitor's."""

    INTERACTIVE = 0
    BATCH = 1
    SHADOW = 2


@dataclass(frozen=True, slots=True)
class BatchBounds:
    """`rows` and padded `tokens` that one batch may hold, and the age from which a row is overdue.

    `gap_tokens` is the same for rows below INTERACTIVE: what may stand in the way of one that comes next.
    """

    rows: int
    tokens: int
    max_age_s: float
    gap_tokens: int = 256


@dataclass(frozen=True, slots=True)
class Speed:
    """What predicted work takes: `pace` times the table's time, on `replicas`, `call_s` more for each batch."""

    pace: float = 1.0
    replicas: float = 1.0
    call_s: float = 0.0

    def seconds(self, work_ms: float) -> float:
        """Until this much work is done by all replicas together."""
        return work_ms / 1000 * self.pace / self.replicas


@dataclass(slots=True, eq=False)
class Entry:
    """A row that waits or is under way. `deadline` is when its reply must be out, NEVER for none.

    `due` orders the queue: the deadline, or for rows without one the moment when the longest admissible wait would end,
    so that they too become the earliest in the end. `waiting` is the queue's own note.
    """

    length: int
    cost_ms: float
    arrived: float
    due: float
    deadline: float = NEVER
    key: str = ""
    weight: float = 1.0
    priority: Priority = Priority.INTERACTIVE
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """A batch to run, and the rows that cannot make their deadline any more, which cost nothing."""

    batch: list[Entry]
    late: list[Entry]


@dataclass(slots=True, eq=False)
class Queue:
    """What waits for one variant, and how much work is under way.

    An entry is pushed, then taken or removed, and settled once when it has left for good; one that comes back from
    a lost replica is pushed again, unsettled.
    """

    bounds: BatchBounds
    _waiting: dict[Priority, list[Entry]] = field(default_factory=lambda: {priority: [] for priority in Priority})
    _outstanding: dict[Priority, dict[str, float]] = field(default_factory=lambda: {each: {} for each in Priority})
    _weights: dict[str, float] = field(default_factory=dict)
    _served: dict[str, float] = field(default_factory=dict)
    _forgot_at: float = 0.0
    _under_way_ms: float = 0.0
    _admitted: set[Entry] = field(default_factory=set)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Entry]:
        """Those that wait, the most urgent first."""
        for waiting in self._waiting.values():
            yield from waiting

    def waiting(self, priority: Priority) -> Sequence[Entry]:
        return self._waiting[priority]

    def work_ms(self, priority: Priority = Priority.INTERACTIVE) -> float:
        """Predicted work of all entries of this priority that are not settled, under way included."""
        return math.fsum(self._outstanding[priority].values())

    @property
    def waiting_ms(self) -> float:
        """Predicted work of the INTERACTIVE entries that wait, what is under way left out."""
        return math.fsum(entry.cost_ms for entry in self._waiting[Priority.INTERACTIVE])

    def push(self, entry: Entry) -> None:
        """Queue a row, or one that came back."""
        if entry in self._admitted:
            self._under_way_ms -= entry.cost_ms
        else:
            self._admitted.add(entry)
            mine = self._outstanding[entry.priority]
            mine[entry.key] = mine.get(entry.key, 0.0) + entry.cost_ms
        self._weights[entry.key] = entry.weight
        insort(self._waiting[entry.priority], entry, key=_due)
        entry.waiting = True

    def remove(self, entry: Entry) -> bool:
        """Take a waiting row out of the queue without running it; whether it waited."""
        if not entry.waiting:
            return False
        waiting = self._waiting[entry.priority]
        at = bisect_left(waiting, entry.due, key=_due)
        while waiting[at] is not entry:
            at += 1
        del waiting[at]
        entry.waiting = False
        return True

    def settle(self, entry: Entry) -> None:
        """The row has its answer, an error, or nobody waits for it. A second time does nothing."""
        if entry not in self._admitted:
            return
        self._admitted.discard(entry)
        if not self.remove(entry):
            self._under_way_ms = max(0.0, self._under_way_ms - entry.cost_ms)
        mine = self._outstanding[entry.priority]
        left = mine[entry.key] - entry.cost_ms
        if left > 1e-9:
            mine[entry.key] = left
        else:
            del mine[entry.key]

    def has_room(self, key: str, weight: float, limit_ms: float, priority: Priority = Priority.INTERACTIVE) -> bool:
        """Whether a request may enter: while the work before it is below the limit, or its key's part of it is.

        Keys that have work here share the limit by weight, so that one that floods the queue is refused and the others
        are not. The request's own work does not count: one that is larger than the limit is answered by an idle system.
        """
        held = self._outstanding[priority]
        if math.fsum(held.values()) < limit_ms:
            return True
        weights = weight + math.fsum(self._weights[other] for other in held if other != key)
        return held.get(key, 0.0) < limit_ms * weight / weights

    def can_promise(self, entries: Sequence[Entry], now: float, speed: Speed) -> bool:
        """Whether these rows (of one request, one deadline) can be in time, and all that were admitted before stay so.

        Earliest deadline first is optimal on one machine (Jackson's rule), so the queue in order of `due` either fits
        or nothing does. A row comes back when its batch does, and is taken to share a full one where there is work for
        it: batches that are kept small for the sake of a tight deadline cost all the others their time. Rows that are
        late already do not count against the new ones.
        """
        if not entries or entries[0].deadline == NEVER:
            return True
        deadline = entries[0].deadline
        added = math.fsum(entry.cost_ms for entry in entries)
        waiting = self._waiting[Priority.INTERACTIVE]
        full = self._budget_ms([*waiting[:BUDGET_SAMPLE], *entries])
        slow = replace(speed, pace=PROMISED * speed.pace)

        def end(work: float, under_way: float) -> float:
            """When the last of so much work is back: its own batch runs at one replica, what is before it at all."""
            own = min(full, work)
            return now + slow.seconds(under_way + work - own) + _alone_s(own, slow)

        before = 0.0
        for entry in waiting:
            if entry.due > deadline:
                break
            before += entry.cost_ms
        if end(before + added, self._under_way_ms) > deadline:
            return False
        for entry in waiting:
            if entry.due <= deadline:
                continue
            before += entry.cost_ms
            # Of the batch under way some part is done already: what may still be kept is protected.
            kept = end(before, 0.0) <= entry.deadline
            if kept and end(before + added, self._under_way_ms) > entry.deadline:
                return False
        return True

    def take(self, now: float, speed: Speed, lowest: Priority = Priority.SHADOW) -> Taken:
        """The next batch, of one priority, `lowest` or above it; lower ones only where nothing above them waits."""
        self._forget(now)
        begins = now + speed.seconds(self._under_way_ms)
        late: list[Entry] = []
        for priority in Priority:
            if priority > lowest:
                break
            late += self._drop_late(priority, begins, speed)
            if self._waiting[priority]:
                batch = self._choose(self._waiting[priority], now, begins, speed, priority)
                self._start(batch)
                return Taken(batch, late)
        return Taken([], late)

    def take_one(self, entry: Entry) -> None:
        """This one alone, whatever else waits."""
        if self.remove(entry):
            self._under_way_ms += entry.cost_ms

    def _drop_late(self, priority: Priority, begins: float, speed: Speed) -> list[Entry]:
        waiting = self._waiting[priority]
        late = [entry for entry in waiting if entry.deadline < begins + _alone_s(entry.cost_ms, speed)]
        for entry in late:
            self.settle(entry)
        return late

    def _choose(
        self, waiting: Sequence[Entry], now: float, begins: float, speed: Speed, priority: Priority
    ) -> list[Entry]:
        """The most urgent row leads. Overdue ones follow by `due`, then those nearest to the leader in length.

        A batch costs its longest row times its rows, hence the lengths; the most urgent row is in every batch, so none
        waits for more batches than there are rows before it. Rows of keys that are ahead of others come last, and a
        batch ends where the next row would make a member late.
        """
        budget_ms = self._budget_ms(waiting)
        served = {key: self._served.get(key, 0.0) for key in {entry.key for entry in waiting}}
        left = _counts(waiting) if len(served) > 1 else {}
        tokens = self.bounds.tokens if priority is Priority.INTERACTIVE else self.bounds.gap_tokens
        batch = _Batch(self.bounds.rows, tokens, begins, speed)
        aside: list[Entry] = []
        for entry in self._by_need(waiting, now):
            if left and served[entry.key] > min(served[key] for key in left) + SLACK * budget_ms / entry.weight:
                aside.append(entry)
            elif batch.fits(entry):
                if not batch.keeps(entry):
                    return batch.entries
                batch.add(entry)
                if left:
                    served[entry.key] += entry.cost_ms / entry.weight
                    left[entry.key] -= 1
                    if not left[entry.key]:
                        del left[entry.key]
        for entry in aside:
            if batch.fits(entry):
                if not batch.keeps(entry):
                    break
                batch.add(entry)
        return batch.entries

    def _by_need(self, waiting: Sequence[Entry], now: float) -> list[Entry]:
        """The most urgent row first, of the key that was served least where several wait."""
        served = {key: self._served.get(key, 0.0) for key in {entry.key for entry in waiting}}
        least = min(served.values())
        leader = next(entry for entry in waiting if served[entry.key] <= least + NOTHING_MS)
        overdue: list[Entry] = []
        fresh: list[Entry] = []
        for entry in waiting:
            if entry is leader:
                continue
            age = self.bounds.max_age_s
            (overdue if now - entry.arrived >= age or entry.deadline - now <= age else fresh).append(entry)
        fresh.sort(key=lambda entry: abs(entry.length - leader.length))
        return [leader, *overdue, *fresh]

    def _budget_ms(self, waiting: Sequence[Entry]) -> float:
        """What a full batch of such rows costs."""
        tokens = sum(entry.length for entry in waiting)
        return math.fsum(entry.cost_ms for entry in waiting) / max(tokens, 1) * self.bounds.tokens

    def _forget(self, now: float) -> None:
        """Let what keys were served fade."""
        kept = math.exp(min(0.0, self._forgot_at - now) / FORGET_S)
        self._forgot_at = max(now, self._forgot_at)
        self._served = {key: ms * kept for key, ms in self._served.items() if ms * kept > NOTHING_MS}
        held = {key for work in self._outstanding.values() for key in work}
        self._weights = {key: weight for key, weight in self._weights.items() if key in held}

    def _start(self, batch: Iterable[Entry]) -> None:
        for entry in batch:
            self.remove(entry)
            self._under_way_ms += entry.cost_ms
            self._served[entry.key] = self._served.get(entry.key, 0.0) + entry.cost_ms / entry.weight


@dataclass(slots=True)
class _Batch:
    """A batch as it fills, from its beginning at time `begins`."""

    rows: int
    tokens: int
    begins: float
    speed: Speed
    entries: list[Entry] = field(default_factory=list)
    longest: int = 0
    work_ms: float = 0.0
    limit: float = NEVER

    def fits(self, entry: Entry) -> bool:
        """Within rows and padded tokens; a first row always does."""
        size = len(self.entries)
        return not size or (size < self.rows and max(self.longest, entry.length) * (size + 1) <= self.tokens)

    def keeps(self, entry: Entry) -> bool:
        """Whether all rows in the batch, this one included, will be in time."""
        done = self.begins + _alone_s(self.work_ms + entry.cost_ms, self.speed)
        return not self.entries or done <= min(self.limit, entry.deadline)

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.longest = max(self.longest, entry.length)
        self.work_ms += entry.cost_ms
        self.limit = min(self.limit, entry.deadline)


def retry_after_s(backlog_s: float, limit_s: float) -> int:
    """Whole seconds until the backlog will be half of the limit; at least one."""
    return max(1, math.ceil(backlog_s - limit_s / 2))


def corrected_pace(pace: float, predicted_ms: float, observed_ms: float, weight: float = 0.1) -> float:
    """Exponential average of observed over predicted time, bounded so that one outlier cannot close the door."""
    if predicted_ms <= 0:
        return pace
    ratio = min(max(observed_ms / predicted_ms, 0.1), 10.0)
    return pace + weight * (ratio - pace)


def _due(entry: Entry) -> float:
    return entry.due


def _alone_s(work_ms: float, speed: Speed) -> float:
    """A batch of this much work, from its start at one replica to its reply."""
    return work_ms / 1000 * speed.pace + speed.call_s


def _counts(waiting: Sequence[Entry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in waiting:
        counts[entry.key] = counts.get(entry.key, 0) + 1
    return counts
