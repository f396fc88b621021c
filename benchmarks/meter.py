"""CPU seconds in one measured window: of the server under test and its parts, and of the whole machine, so that others
show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.processes import REPLICA, Server


@dataclass(frozen=True, slots=True)
class CpuWindow:
    """CPU seconds in one measured window: of the server, and of the whole machine with its `cores`."""

    server_s: float
    machine_s: float
    cores: int

    def others(self, report: Mapping[str, Any]) -> float:
        """The share of the machine that neither the server nor the client took, by the client's report."""
        spare = self.machine_s - self.server_s - report["client_cpu_s"]
        return round(max(0.0, float(spare)) / (self.cores * float(report["window_s"])), 4)


class Meter:
    """Reads the CPU clocks of a server and of the machine when the load client says that a window opens or closes."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen: list[tuple[float, float]] = []

    def read(self, _: str) -> None:
        self._seen.append((self._server.cpu_seconds(), busy_seconds()))

    def window(self, cores: int) -> CpuWindow:
        (server_open, machine_open), (server_closed, machine_closed) = self._seen
        return CpuWindow(server_closed - server_open, machine_closed - machine_open, cores)


class Parts:
    """The processes of a server by what they are.

    Found once, when it has settled and nothing is asked: busy ones have other titles, and HAProxy is started anew when
    routers come.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._router = server.processes(f"{REPLICA}RouterIngress")
        every = server.processes(REPLICA)
        self._replicas = [each for each in every if each not in self._router]
        self._proxy = [each for each in server.processes("") if "haproxy" in name_of(each)]

    def spent(self) -> dict[str, float]:
        """Processor seconds of the router, of HAProxy, of the replicas, and of all the rest of the server."""
        named = {"router": self._router, "replicas": self._replicas, "proxy": self._proxy}
        found = {name: seconds_of(each) for name, each in named.items()}
        return {**found, "rest": self._server.cpu_seconds() - sum(found.values())}


def busy_seconds() -> float:
    """CPU seconds that the whole machine has spent on anything since it started; what the hypervisor took included."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def seconds_of(processes: Sequence[psutil.Process]) -> float:
    spent = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        spent += times.user + times.system
    return spent


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
