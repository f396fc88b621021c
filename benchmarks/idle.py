"""What a service takes when nobody asks, and under load, by process: processor time and memory, Ray's own share shown.

    python -m benchmarks.idle FAMILY [--seconds 60] [--connections 64] [-- OPTIONS OF fettle serve]

Memory is proportional: what several processes share counts once, in parts. The load is a closed loop with one text a
request; processor time is then a request's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import REPLICA, Server, ServerSpec, title_of
from benchmarks.startup import command
from fettle.bench.crew import measure
from fettle.bench.load import LoadPlan
from fettle.bench.traffic import Kind
from fettle.family import Family
from fettle.manifest import TaskKind

LOG = Path("build/benchmark-logs/idle.log")
SETTLE_S = 15.0
# By what a process's title begins with, or its command holds: what it is, and whether Ray or Fettle says what it does.
KINDS = (
    # Whose arguments are modules of Ray.
    ("forkserver.py", "fork server", "fettle"),
    (f"{REPLICA}RouterIngress", "router", "fettle"),
    (f"{REPLICA}Monitor", "monitor", "fettle"),
    (REPLICA, "replicas", "fettle"),
    ("ray::ServeController", "Serve controller", "ray"),
    ("ray::HAProxyManager", "Serve HAProxy manager", "ray"),
    ("ray::ProxyActor", "Serve proxy (fallback)", "ray"),
    ("ray::DashboardAgent", "dashboard agent", "ray"),
    ("ray::RuntimeEnvAgent", "runtime-env agent", "ray"),
    ("ray::IDLE", "idle workers", "ray"),
    ("haproxy", "HAProxy", "ray"),
    ("gcs_server", "GCS", "ray"),
    ("raylet", "raylet", "ray"),
    ("log_monitor.py", "log monitor", "ray"),
    ("monitor.py", "Ray's autoscaler", "ray"),
    ("ray-dashboard-", "dashboard", "ray"),
    ("dashboard.py", "dashboard", "ray"),
    ("multiprocessing", "dashboard", "ray"),
    ("fettle.cli", "fettle serve", "fettle"),
)


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    family = Family.open(options.family)
    with tempfile.TemporaryDirectory() as scratch:
        spec = command(family, scratch, options.serve)
        with Server(spec, LOG) as server:
            time.sleep(SETTLE_S)
            idle, memory = idle_seconds(server, options.seconds), memory_of(server)
            loaded = loaded_ms(server, spec, family, options)
            memory_then = memory_of(server)
    parts = {
        name: {
            "owner": owner,
            "idle_cpu_s_a_minute": round(60 * idle[name] / options.seconds, 2),
            "memory_mb": round(memory[name] / 1e6),
            "loaded_cpu_ms_a_request": round(loaded["ms"].get(name, 0.0), 3),
            "loaded_memory_mb": round(memory_then.get(name, 0) / 1e6),
        }
        for name, owner in {name: owner for _, name, owner in KINDS}.items()
        if name in memory
    }
    if not options.json:
        print_table(parts, loaded["rps"])
    found = {"parts": parts, "requests_per_s": loaded["rps"], "seconds": options.seconds, "serve": options.serve}
    print(json.dumps({"benchmark": "idle", "family": family.name, "hardware": machine, **found}))


def kind_of(process: psutil.Process) -> str:
    said = title_of(process)
    return next((name for begin, name, _ in KINDS if said.startswith(begin) or begin in said), said[:40])


def spent(server: Server) -> dict[psutil.Process, tuple[str, float]]:
    """Processor seconds of each process, and what it is."""
    found = {}
    for process in server.processes(""):
        try:
            times = process.cpu_times()
            found[process] = (kind_of(process), times.user + times.system)
        except psutil.Error:
            continue
    return found


def difference(
    before: Mapping[psutil.Process, tuple[str, float]], after: Mapping[psutil.Process, tuple[str, float]]
) -> dict[str, float]:
    """By kind; of a process that is new, all of it. Busy replicas have other titles, so the kind is of before."""
    found: dict[str, float] = defaultdict(float)
    for process, (kind, seconds) in after.items():
        known = before.get(process)
        found[known[0] if known else kind] += seconds - (known[1] if known else 0.0)
    return found


def idle_seconds(server: Server, seconds: float) -> dict[str, float]:
    before = spent(server)
    time.sleep(seconds)
    return difference(before, spent(server))


def memory_of(server: Server) -> dict[str, int]:
    """Proportional bytes by kind."""
    found: dict[str, int] = defaultdict(int)
    for process in server.processes(""):
        try:
            found[kind_of(process)] += process.memory_full_info().pss
        except psutil.Error:
            continue
    return found


def loaded_ms(server: Server, spec: ServerSpec, family: Family, options: argparse.Namespace) -> dict[str, Any]:
    """Processor ms a request by kind under a closed loop, and its rate."""
    kind: Kind = "classify" if family.manifest.task.kind is TaskKind.CLASSIFY else "openai"
    plan = LoadPlan(spec.url, family.name, kind=kind, connections=options.connections, seconds=10.0, warm_up=3.0)
    first, seen = spent(server), []
    found = measure(plan, on_window=lambda _: seen.append(spent(server)))
    named = [{each: (first.get(each, was)[0], was[1]) for each, was in window.items()} for window in seen]
    count = int(found.inside.good.sum())
    return {
        "ms": {name: 1000 * took / count for name, took in difference(named[0], named[1]).items()},
        "rps": round(count / found.window_s, 1),
    }


def print_table(parts: Mapping[str, Mapping[str, Any]], rps: float) -> None:
    made = Table("process", "of", "idle, CPU s a minute", "MB", f"at {rps:.0f} requests/s, CPU ms each", "MB")
    columns = ("idle_cpu_s_a_minute", "memory_mb", "loaded_cpu_ms_a_request", "loaded_memory_mb")
    for name, part in parts.items():
        made.add_row(name, part["owner"], *(f"{part[column]:g}" for column in columns))
    for owner in ("ray", "fettle"):
        sums = [sum(part[column] for part in parts.values() if part["owner"] == owner) for column in columns]
        made.add_row("all", owner, *(f"{value:.4g}" for value in sums))
    Console(width=120).print(made)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle")
    parser.add_argument("family", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of watching it idle")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("serve", nargs="*", help="options of `fettle serve`, after --")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
