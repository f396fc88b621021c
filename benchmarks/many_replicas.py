"""As many real replicas as this machine carries: what one takes of it, and what the router then costs for a request.

Fake engines on Ray, which sleep as long as a batch takes, behind the product's own router: the same load on ever more
replicas. No model, so nothing but serving itself takes processor time. Ends where the next number would not fit the
memory that is free.

    python -m benchmarks.many_replicas --replicas 2 8 32
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.meter import Parts
from benchmarks.processes import REPLICA, Server
from deployments.fastpath import free_port
from fettle.bench.crew import run_apart
from fettle.bench.load import LoadPlan
from tests.fakes import FakeVariant, make_fake_family

LOG = Path("build/benchmark-logs/many_replicas.log")
# A batch takes this long in its replica; more tokens take no more, so that all numbers of replicas meet the same load.
CALL_MS = 20.0
# Of the memory that is free, at most so much is taken.
TAKEN = 0.7


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    rows: list[dict[str, Any]] = []
    for count in options.replicas:
        if rows and count * rows[-1]["replica_mb"] * 1e6 > TAKEN * psutil.virtual_memory().available:
            say(f"{count} replicas would take more memory than is free; there are results up to {rows[-1]['replicas']}")
            break
        say(f"{count} replicas")
        rows.append(run(options, count))
    if not options.json:
        Console(width=120).print(table(rows))
    settings = {"rate": options.rate, "seconds": options.seconds, "call_ms": CALL_MS}
    print(json.dumps({"benchmark": "many_replicas", "hardware": machine, "settings": settings, "results": rows}))
    sys.exit(0 if all(row["failed"] == 0 for row in rows) else 1)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fettle-many-") as scratch:
        directory = Path(scratch) / "family"
        make_fake_family(directory, name="many", variants=[FakeVariant("fake", ms_per_call=CALL_MS)])
        settings = service.config(directory, count, Path(scratch) / "evidence", share=0.0)
        spec = service.spec(settings, free_port(), "/classify", "many")
        plan = LoadPlan(
            url=spec.url, model="many", kind="classify", rate=options.rate, seconds=options.seconds, synthetic=(4, 12)
        )
        with Server(spec, LOG) as server:
            replicas = server.processes(f"{REPLICA}many.fake")
            parts, seen = Parts(server), []
            report = run_apart(plan, lambda _: seen.append(parts.spent()["router"]))
            memory = sum(process.memory_full_info().uss for process in replicas)
    opened, closed = seen
    return {
        "replicas": len(replicas),
        "requests": report["requests"],
        "failed": report["requests"] - report["statuses"].get("200", 0),
        "p50_ms": report["p50_ms"],
        "p99_ms": report["p99_ms"],
        "router_ms": round(1000 * (closed - opened) / report["requests"], 3),
        "router_share": round((closed - opened) / report["window_s"], 3),
        "replica_mb": round(memory / len(replicas) / 1e6),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="Real replicas, fake engines, one router", title_justify="left")
    names = {
        "replicas": "replicas",
        "p50_ms": "p50 ms",
        "p99_ms": "p99 ms",
        "router_ms": "router, CPU ms/request",
        "router_share": "of a core",
        "replica_mb": "MB each",
    }
    for name in names.values():
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(*(str(row[name]) for name in names))
    return made


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
