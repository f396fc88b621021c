"""One variant's replicas in simulated time: the router's own queue, an oracle and plain order meet the same jobs.

A discrete-event simulation, pure and deterministic: a policy says who is let in and what fills the next batch, the
machine takes as long as the jobs really need, whatever was predicted. `RouterPolicy` holds the `Queue` that the router
holds. Nothing sleeps and nothing is served.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fettle.scheduling import BatchBounds, Entry, Queue, Speed, corrected_pace


@dataclass(frozen=True, slots=True)
class Job:
    """A request of one row. Times in seconds; `deadline` is when its reply must be out, on the clock of `arrived`.

    `predicted_ms` is what the policy may know of `true_ms`, which it takes.
    """

    number: int
    arrived: float
    deadline: float
    length: int
    predicted_ms: float
    true_ms: float
    key: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """`replicas` of one variant. Each holds `places` batches, the one it works on and those that wait there.

    A batch takes `call_s` and the sum of its rows.
    """

    replicas: int = 2
    places: int = 2
    call_s: float = 0.0045


class Policy(Protocol):
    """Who is let in, and who goes next. A job that was let in and never comes out of `take` is a late one."""

    def offer(self, job: Job, now: float) -> bool: ...

    def take(self, now: float) -> Sequence[Job]: ...

    def finished(self, batch: Sequence[Job], took_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """By job number, the second at which each was answered; who is missing was refused or dropped."""

    jobs: Sequence[Job]
    answered: dict[int, float]
    refused: int
    busy_s: float

    @property
    def in_time(self) -> int:
        return sum(self.answered.get(job.number, float("inf")) <= job.deadline for job in self.jobs)

    @property
    def share(self) -> float:
        return self.in_time / max(1, len(self.jobs))


@dataclass(slots=True)
class _Replica:
    """What it works on comes first."""

    batches: deque[Sequence[Job]] = field(default_factory=deque)


def simulate(jobs: Sequence[Job], machine: Machine, policy: Policy) -> Outcome:
    """Run until every job that was let in has been answered or forgotten. `jobs` in order of arrival."""
    replicas = [_Replica() for _ in range(machine.replicas)]
    answered: dict[int, float] = {}
    refused, busy_s = 0, 0.0
    order = itertools.count()
    # (time, tie-breaker, what): a job that arrives, or a replica whose batch ends.
    events: list[tuple[float, int, Job | _Replica]] = [(job.arrived, next(order), job) for job in jobs]
    heapq.heapify(events)

    def start(replica: _Replica, now: float) -> None:
        nonlocal busy_s
        took = _seconds(replica.batches[0], machine)
        busy_s += took
        heapq.heappush(events, (now + took, next(order), replica))

    while events:
        now, _, what = heapq.heappop(events)
        if isinstance(what, Job):
            refused += not policy.offer(what, now)
        else:
            done = what.batches.popleft()
            answered |= {job.number: now for job in done}
            policy.finished(done, _seconds(done, machine))
            if what.batches:
                start(what, now)
        while (free := min(replicas, key=lambda replica: len(replica.batches))) and len(free.batches) < machine.places:
            batch = policy.take(now)
            if not batch:
                break
            free.batches.append(batch)
            if len(free.batches) == 1:
                start(free, now)
    return Outcome(jobs, answered, refused, busy_s)


class RouterPolicy:
    """The router's: `fettle.scheduling.Queue`, with predicted costs and a pace that follows what was observed."""

    def __init__(self, bounds: BatchBounds, machine: Machine, max_queue_s: float = 2.0) -> None:
        self._queue = Queue(bounds)
        self._machine = machine
        self._max_queue_s = max_queue_s
        self._pace = 1.0
        self._jobs: dict[Entry, Job] = {}
        self._entries: dict[int, Entry] = {}

    @property
    def _speed(self) -> Speed:
        return Speed(self._pace, self._machine.replicas, self._machine.call_s)

    def offer(self, job: Job, now: float) -> bool:
        limit_ms = self._max_queue_s * 1000 * self._machine.replicas / self._pace
        entry = Entry(
            length=job.length,
            cost_ms=job.predicted_ms,
            arrived=now,
            due=min(job.deadline, now + self._max_queue_s),
            deadline=job.deadline,
            key=job.key,
        )
        if not self._queue.has_room(job.key, 1.0, limit_ms):
            return False
        if not self._queue.can_promise([entry], now, self._speed):
            return False
        self._queue.push(entry)
        self._jobs[entry], self._entries[job.number] = job, entry
        return True

    def take(self, now: float) -> Sequence[Job]:
        taken = self._queue.take(now, self._speed)
        for entry in taken.late:
            del self._entries[self._jobs.pop(entry).number]
        return [self._jobs[entry] for entry in taken.batch]

    def finished(self, batch: Sequence[Job], took_s: float) -> None:
        # The router sees when batches come back, their calls included.
        self._pace = corrected_pace(self._pace, sum(job.predicted_ms for job in batch), 1000 * took_s)
        for job in batch:
            entry = self._entries.pop(job.number)
            del self._jobs[entry]
            self._queue.settle(entry)


class InOrder:
    """First in, first out, deadlines unknown; refuses only where the queue holds `max_queue_s` of predicted work."""

    def __init__(self, bounds: BatchBounds, machine: Machine, max_queue_s: float = 2.0) -> None:
        self._bounds = bounds
        self._limit_ms = max_queue_s * 1000 * machine.replicas
        self._waiting: deque[Job] = deque()
        self._outstanding_ms = 0.0

    def offer(self, job: Job, now: float) -> bool:  # noqa: ARG002
        if self._outstanding_ms >= self._limit_ms:
            return False
        self._outstanding_ms += job.predicted_ms
        self._waiting.append(job)
        return True

    def take(self, now: float) -> Sequence[Job]:  # noqa: ARG002
        batch: list[Job] = []
        longest = 0
        while self._waiting and len(batch) < self._bounds.rows:
            longest = max(longest, self._waiting[0].length)
            if batch and longest * (len(batch) + 1) > self._bounds.tokens:
                break
            batch.append(self._waiting.popleft())
        return batch

    def finished(self, batch: Sequence[Job], took_s: float) -> None:  # noqa: ARG002
        self._outstanding_ms -= sum(job.predicted_ms for job in batch)


class MostRows:
    """Knows what every job that has come really takes, and gives up those whose loss saves the most others.

    At every free place it keeps the largest set of the waiting that can all be in time (Moore, "An n job, one machine
    sequencing algorithm for minimizing the number of late jobs", 1968, with the replicas as one machine), and runs the
    earliest of it. Jobs go one by one, so it is given machines on which a call costs nothing: `ideal`.
    """

    def __init__(self, machine: Machine) -> None:
        self._replicas = machine.replicas
        self._waiting: list[Job] = []

    def offer(self, job: Job, now: float) -> bool:  # noqa: ARG002
        self._waiting.append(job)
        return True

    def take(self, now: float) -> Sequence[Job]:
        self._waiting = [job for job in self._waiting if now + job.true_ms / 1000 <= job.deadline]
        kept = self._largest_set(now)
        if not kept:
            return []
        chosen = min(kept, key=lambda job: job.deadline)
        self._waiting.remove(chosen)
        return [chosen]

    def finished(self, batch: Sequence[Job], took_s: float) -> None:
        """It remembers nothing."""

    def _largest_set(self, now: float) -> list[Job]:
        kept: list[tuple[float, int, Job]] = []
        finish = now
        for job in sorted(self._waiting, key=lambda job: job.deadline):
            seconds = job.true_ms / 1000 / self._replicas
            heapq.heappush(kept, (-seconds, job.number, job))
            finish += seconds
            if finish > job.deadline:
                finish += heapq.heappop(kept)[0]
        return [job for _, _, job in kept]


def ideal(jobs: Iterable[Job], machine: Machine, rows_a_call: float) -> tuple[list[Job], Machine]:
    """Jobs that each carry their part of a full batch's call, and a machine whose calls cost nothing."""
    share_ms = 1000 * machine.call_s / rows_a_call
    each = [
        Job(job.number, job.arrived, job.deadline, job.length, job.predicted_ms, job.true_ms + share_ms, job.key)
        for job in jobs
    ]
    return each, Machine(machine.replicas, places=1, call_s=0.0)


def most_possible(jobs: Sequence[Job], machine: Machine) -> int:
    """No schedule answers more in time: the shortest jobs, as many as the machine has time for until the last deadline.

    `jobs` and `machine` as `ideal` makes them.
    """
    if not jobs:
        return 0
    left_s = machine.replicas * (max(job.deadline for job in jobs) - min(job.arrived for job in jobs))
    for count, seconds in enumerate(sorted(job.true_ms / 1000 for job in jobs)):
        left_s -= seconds
        if left_s < 0:
            return count
    return len(jobs)


def _seconds(batch: Sequence[Job], machine: Machine) -> float:
    return machine.call_s + sum(job.true_ms for job in batch) / 1000
