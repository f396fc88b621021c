"""Processors in simulated time: processes that run when they have work, and share cores as the system's scheduler does.

A fluid model of fair scheduling: whoever has work runs at a rate that follows its weight, never on more cores than it
has threads; what one cannot use the others get. Nothing knows what the work is for.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

# How the Linux scheduler weighs niceness: each step is a factor of 1.25.
STEP = 1.25
NEVER = math.inf
Done = Callable[[float], None]


@dataclass(slots=True, eq=False)
class Process:
    """One thing after the other. `threads` bounds the cores that it uses at a time; `claims` is the caller's count."""

    cores: Cores
    niceness: int = 0
    threads: float = 1.0
    busy_s: float = 0.0
    left: float = 0.0
    rate: float = 0.0
    claims: int = 0
    weight: float = field(init=False)
    _jobs: deque[tuple[float, Done]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.weight = self.threads / STEP**self.niceness

    def add(self, seconds: float, done: Done, now: float) -> None:
        """Work for one core alone; `done` hears when it is finished."""
        self.busy_s += seconds
        self._jobs.append((seconds, done))
        if len(self._jobs) == 1:
            self.left = seconds
            self.cores.begin(self, now)

    @property
    def jobs(self) -> int:
        return len(self._jobs)

    def next_job(self) -> Done:
        """Take away what was done and begin with the next; returns whom to tell."""
        _, done = self._jobs.popleft()
        if self._jobs:
            self.left = self._jobs[0][0]
        return done


class Cores:
    """`count` cores and the processes that have work; with NEVER as the count each has as many as it can use."""

    def __init__(self, count: float) -> None:
        self._count = count
        self._running: list[Process] = []
        self._now = 0.0
        self._next: tuple[float, Process | None] = (NEVER, None)
        # Of those that share nothing: when each is finished.
        self._alone: list[tuple[float, int, Process]] = []
        self._order = itertools.count()

    @property
    def next_at(self) -> float:
        """When the first of them is finished, if nothing else happens before."""
        if self._count == NEVER:
            return self._alone[0][0] if self._alone else NEVER
        return self._next[0]

    def begin(self, process: Process, now: float) -> None:
        if self._count == NEVER:
            self._begin_alone(process, now)
            return
        self._advance(now)
        self._running.append(process)
        self._share()

    def finish(self) -> None:
        """Go to `next_at` and tell whose work was done."""
        if self._count == NEVER:
            self._finish_alone()
            return
        now, process = self._next
        if process is None:
            return
        self._advance(now)
        done = process.next_job()
        if process.jobs:
            self._find()
        else:
            self._running.remove(process)
            self._share()
        done(now)

    def _begin_alone(self, process: Process, now: float) -> None:
        heapq.heappush(self._alone, (now + process.left / process.threads, next(self._order), process))

    def _finish_alone(self) -> None:
        now, _, process = heapq.heappop(self._alone)
        done = process.next_job()
        if process.jobs:
            self._begin_alone(process, now)
        done(now)

    def _advance(self, now: float) -> None:
        passed = now - self._now
        if passed > 0:
            for process in self._running:
                process.left -= process.rate * passed
            self._now = now

    def _share(self) -> None:
        """Fill cores by weight, and give what is over to those that can use more."""
        left, waiting = self._count, self._running
        while waiting:
            unit = left / sum(process.weight for process in waiting)
            full = [process for process in waiting if process.weight * unit >= process.threads]
            for process in full or waiting:
                process.rate = process.threads if full else process.weight * unit
            if not full:
                break
            left -= sum(process.threads for process in full)
            waiting = [process for process in waiting if process not in full]
        self._find()

    def _find(self) -> None:
        self._next = (NEVER, None)
        for process in self._running:
            at = self._now + max(0.0, process.left) / process.rate
            if at < self._next[0]:
                self._next = (at, process)
