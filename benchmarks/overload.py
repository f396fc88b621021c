"""Twice the load that a variant can bear: who is answered, who is refused, how fast, and is anyone forgotten.

Finds the sustainable rate with a closed loop, then sends a multiple of it in an open loop for a while, then the same
closed loop again, to see whether the service recovers. Every request must end in one reply; every refusal must be a
429 with `Retry-After`. The exit status is 1 if one is not.

    python -m benchmarks.overload build/family-embeddings --variant onnx-int8-dynamic
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import Server
from benchmarks.systems import fettle_system
from deployments.fastpath import free_port
from fettle.bench.crew import run_apart
from fettle.bench.load import TEXTS, LoadPlan
from fettle.family import Family

LOG = Path("build/benchmark-logs/overload.log")


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    reports = run(options, machine["cores"])
    broken = broken_promises(reports["overload"])
    if not options.json:
        Console(width=120).print(table(reports))
    settings = {name: getattr(options, name) for name in ("variant", "factor", "seconds", "connections", "seed")}
    head = {"benchmark": "overload", "hardware": machine, "settings": settings}
    print(json.dumps(head | reports | {"broken_promises": broken}))
    sys.exit(1 if broken else 0)


def run(options: argparse.Namespace, cores: int) -> dict[str, dict[str, Any]]:
    """The three phases against one server: `sustained`, `overload`, `recovered`."""
    system = fettle_system(options.family, Family.open(options.family).name, options.variant, cores)
    spec = system.server(free_port())
    closed = LoadPlan(
        spec.url,
        system.model,
        texts=options.texts,
        connections=options.connections,
        seconds=options.calibrate,
        warm_up=5.0,
        seed=options.seed,
    )
    with Server(spec, LOG):
        sustained = run_apart(closed)
        rate = options.factor * sustained["rps"]
        overload = run_apart(replace(closed, rate=rate, seconds=options.seconds, warm_up=0.0))
        recovered = run_apart(closed)
    return {"sustained": sustained, "overload": overload | {"offered_rps": round(rate, 1)}, "recovered": recovered}


def broken_promises(report: Mapping[str, Any]) -> list[str]:
    """What an overloaded service must never do, and did."""
    statuses: dict[str, int] = report["statuses"]
    refused = statuses.get("429", 0)
    bare = refused - report.get("refused", {}).get("with_retry_after", 0)
    others = {status: count for status, count in statuses.items() if status not in ("200", "429")}
    broken = [f"{bare} refusals without Retry-After"] if bare else []
    return broken + [f"{count} x status {status}" for status, count in others.items()]


def table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    made = Table("phase")
    for name in ("answered/s", "p50 ms", "p99 ms", "200", "429", "other", "429 p50 ms", "429 p99 ms"):
        made.add_column(name, justify="right")
    for phase, report in reports.items():
        statuses = dict(report["statuses"])
        good, refused = statuses.pop("200", 0), statuses.pop("429", 0)
        refusals = report.get("refused", {})
        cells = (report["rps"], report["p50_ms"], report["p99_ms"], good, refused, sum(statuses.values()))
        made.add_row(phase, *(str(c) for c in (*cells, refusals.get("p50_ms", ""), refusals.get("p99_ms", ""))))
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--variant", default="onnx-int8-dynamic")
    parser.add_argument("--factor", type=float, default=2.0, help="times the sustainable rate")
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload")
    parser.add_argument("--calibrate", type=float, default=10.0, help="seconds to find the sustainable rate in")
    parser.add_argument("--connections", type=int, default=64, help="of the closed loop")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
