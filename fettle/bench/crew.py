"""Several client processes that send one load together, so that the client is not the bottleneck; and their report.

Each sends its part of the same schedule and keeps its samples; joined on one clock they are the load's. Interrupted,
all close their windows and what was measured so far is reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fettle.bench.load import LoadPlan
from fettle.bench.samples import Samples, summarize
from fettle.errors import FettleError, UsageError

# From "ready" to the first request: every client has to have read the time.
START_IN_S = 0.2


@dataclass(frozen=True, slots=True)
class Tick:
    """How the load went in one second: `ms` is a sample of the good replies' latencies, `cpu_s` all clients' time."""

    second: int
    good: int
    other: int
    flying: int
    cpu_s: float
    ms: list[float]


@dataclass(frozen=True, slots=True)
class Measured:
    """All requests of a load on one clock that starts as its window opens, and what the clients say of themselves."""

    plan: LoadPlan
    samples: Samples
    window_s: float
    clients: list[dict[str, Any]]
    interrupted: bool = False

    @property
    def inside(self) -> Samples:
        """Those that count: due in the window, in a closed loop ended in it."""
        counted = self.samples.due if self.plan.is_open else self.samples.ended
        # Without a warm-up what the first connection sent a moment before the window was open belongs to it too.
        whole = self.plan.ends or not self.plan.warm_up
        return self.samples.where((counted >= (-1.0 if whole else 0.0)) & (counted < self.window_s))


def ignore(_: Any) -> None:
    """Hear of something and do nothing."""


def measure(
    plan: LoadPlan,
    processes: int = 1,
    *,
    on_window: Callable[[str], None] = ignore,
    on_tick: Callable[[Tick], None] = ignore,
) -> Measured:
    """Send the load from so many processes; `on_window` hears "open" and "closed", `on_tick` how each second went.

    Raises:
        UsageError: the texts cannot be read.
        FettleError: a client failed.
    """
    if not plan.is_open:
        processes = min(processes, plan.connections)
    with tempfile.TemporaryDirectory() as scratch:
        parts = [
            replace(plan, part=(number, processes), samples=Path(scratch, f"{number}.npz"))
            for number in range(processes)
        ]
        reports, interrupted = _Crew(parts, on_window, on_tick).run()
        samples = Samples.joined([Samples.load(part.samples) for part in parts if part.samples is not None])
    window_s = max(report["window_s"] for report in reports)
    measured = Measured(plan, samples, window_s, reports, interrupted)
    if plan.samples is not None:
        measured.inside.save(plan.samples)
    return measured


def report(measured: Measured) -> dict[str, Any]:
    """Counts and latencies, by flow where there are several, and what the clients took and saw."""
    inside, window, plan = measured.inside, measured.window_s, measured.plan
    found = summarize(inside, window) | clients_report(measured.clients)
    if len(plan.flows) > 1:
        found["flows"] = {flow.tag: summarize(inside.where(inside.of(flow.tag)), window) for flow in plan.flows}
    return found


def clients_report(clients: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the clients took, how late they were, what they could not do, and the replies that were looked into."""
    lags = [client["send_lag_p99_ms"] for client in clients if client["send_lag_p99_ms"] is not None]
    failed: Counter[str] = Counter()
    for client in clients:
        failed.update(client["connections_failed"])
    return {
        "clients": len(clients),
        "client_cpu_s": round(sum(client["client_cpu_s"] for client in clients), 3),
        "busiest_client": round(max(client["client_cpu_s"] / max(client["window_s"], 1e-9) for client in clients), 3),
        "send_lag_p99_ms": max(lags, default=None),
        "loop_lag_p99_ms": max((client["loop_lag_p99_ms"] or 0.0 for client in clients), default=0.0),
        "out_of_connections": sum(client["out_of_connections"] for client in clients),
        "connections_failed": dict(failed),
        "refusal": next((client["refusal"] for client in clients if client["refusal"]), None),
        "checked": {
            "replies": sum(client["checked"]["replies"] for client in clients),
            "problems": [problem for client in clients for problem in client["checked"]["problems"]],
        },
    }


def run_apart(plan: LoadPlan, on_window: Callable[[str], None] = ignore) -> dict[str, Any]:
    """The report of a load from one process of its own.

    Raises:
        FettleError: the client failed.
    """
    return report(measure(plan, on_window=on_window))


def sampled(plan: LoadPlan, on_window: Callable[[str], None] = ignore) -> tuple[dict[str, Any], Samples]:
    """`run_apart`, and the samples of the window."""
    measured = measure(plan, on_window=on_window)
    return report(measured), measured.inside


class _Crew:
    """The processes, and what they say, line by line."""

    def __init__(
        self, parts: Sequence[LoadPlan], on_window: Callable[[str], None], on_tick: Callable[[Tick], None]
    ) -> None:
        self._on_window, self._on_tick = on_window, on_tick
        self._said: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        # In a session of its own, so that Ctrl-C reaches the crew alone.
        command = [sys.executable, "-m", "fettle.bench.load"]
        self._clients = [
            subprocess.Popen(
                [*command, part.as_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                cwd=Path.cwd(),
            )
            for part in parts
        ]
        for number in range(len(parts)):
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()
        self._ticks: dict[int, list[dict[str, Any]]] = {}
        self._windows: Counter[str] = Counter()

    def run(self) -> tuple[list[dict[str, Any]], bool]:
        interrupted = False
        reports: dict[int, dict[str, Any]] = {}
        try:
            while True:
                try:
                    self._gather(reports)
                except KeyboardInterrupt:
                    if interrupted or not self._windows["open"]:
                        raise
                    interrupted = True
                    self._tell("stop\n")
                    continue
                return [reports[number] for number in sorted(reports)], interrupted
        finally:
            for client in self._clients:
                client.kill()
                client.wait()

    def _gather(self, reports: dict[int, dict[str, Any]]) -> None:
        ready = 0
        while len(reports) < len(self._clients):
            number, message = self._said.get()
            if message is None:
                if number in reports:
                    continue
                status = self._clients[number].wait()
                raise FettleError(f"a load client ended with exit status {status}; see its output above")
            match message:
                case {"error": str(text)}:
                    raise UsageError(text)
                case {"ready": _}:
                    ready += 1
                    if ready == len(self._clients):
                        self._tell(f"{time.perf_counter() + START_IN_S}\n")
                case {"report": found}:
                    reports[number] = found
                case {"window": str(event)}:
                    self._windows[event] += 1
                    # The load's window: from the first that opens to the last that closes.
                    if self._windows[event] == (1 if event == "open" else len(self._clients)):
                        self._on_window(event)
                case {"tick": int(second)}:
                    self._tick(second, message)

    def _tick(self, second: int, message: dict[str, Any]) -> None:
        told = self._ticks.setdefault(second, [])
        told.append(message)
        if len(told) == len(self._clients):
            del self._ticks[second]
            add = {name: sum(each[name] for each in told) for name in ("good", "other", "flying", "cpu")}
            ms = [value for each in told for value in each["ms"]]
            self._on_tick(Tick(second, add["good"], add["other"], add["flying"], add["cpu"], ms))

    def _tell(self, line: str) -> None:
        for client in self._clients:
            if client.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                    client.stdin.write(line)
                    client.stdin.flush()

    def _listen(self, number: int) -> None:
        stdout = self._clients[number].stdout
        for line in stdout or ():
            self._said.put((number, json.loads(line)))
        self._said.put((number, None))


def enough_processes() -> int:
    """For a client that may use as much of the machine as it needs."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def percentile(values: Sequence[float], share: float) -> float | None:
    """For a line of progress."""
    return float(np.quantile(np.asarray(values), share)) if values else None
