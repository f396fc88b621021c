"""Two keys on one service: what a flood by one does to the other.

Both first send 80 % of their half of the capacity, then one sends ten times its half while the other goes on as before.
The other's p99 must rise by less than half, and it must not be refused for it. The exit status is 1 if that fails, or
if a request ends in anything but 200 or 429.

    python -m benchmarks.fairness build/sections-standard
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.meter import Meter
from benchmarks.processes import Server
from deployments.fastpath import free_port
from fettle.bench.arrivals import Profile, steady
from fettle.bench.crew import run_apart, sampled
from fettle.bench.load import TEXTS, LoadPlan
from fettle.bench.samples import Samples, summarize
from fettle.bench.traffic import Flow
from fettle.config import KeyConfig
from fettle.family import Family

LOG = Path("build/benchmark-logs/fairness.log")
QUIET, LOUD = "quiet-key", "loud-key"
MORE = 1.5  # times the quiet key's p99 before the flood, at most
REFUSED = 0.01  # of the quiet key's requests, at most
ENDINGS = ("200", "429")


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    report = run(options, machine["cores"])
    broken = broken_promises(report)
    if not options.json:
        Console(width=120).print(table(report))
        for line in broken:
            print(f"BROKEN: {line}")
    names = ("level", "flood", "seconds", "base", "objective_ms", "seed")
    settings = {name: getattr(options, name) for name in names} | {"family": options.family.name}
    head = {"benchmark": "fairness", "hardware": machine, "settings": settings}
    print(json.dumps(head | report | {"broken_promises": broken}))
    sys.exit(1 if broken else 0)


def run(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Capacity, then one stream of both keys: quiet, flood, quiet again; figures by key and phase."""
    name = Family.open(options.family).name
    with tempfile.TemporaryDirectory() as scratch:
        keys = [KeyConfig(key=QUIET, name="quiet"), KeyConfig(key=LOUD, name="loud")]
        config = service.config(options.family, cores, Path(scratch), objective_ms=options.objective_ms, api_keys=keys)
        spec = service.spec(config, free_port(), "/classify", name, key=QUIET)
        plan = LoadPlan(spec.url, name, texts=options.texts, kind="classify", seed=options.seed)
        with Server(spec, LOG) as server:
            say("capacity")
            both = tuple(Flow(key, max_disagreement=options.level, key=key) for key in (QUIET, LOUD))
            capacity = float(run_apart(replace(plan, flows=both, connections=64, warm_up=8.0))["rps"])
            half = capacity / 2
            say(f"{options.base * capacity:.0f} requests/s, then {options.flood * half:.0f} more from one key")
            flows = (
                replace(both[0], profile=steady(options.base * half, 3 * options.seconds)),
                replace(both[1], profile=flooding(options, half)),
            )
            meter = Meter(server)
            report, samples = sampled(
                replace(
                    plan, flows=flows, warm_up=0.0, seconds=3 * options.seconds, samples=Path(scratch, "samples.npz")
                ),
                meter.read,
            )
            others = meter.window(cores).others(report)
    return {
        "capacity_rps": capacity,
        "phases": phases(samples, options.seconds),
        "client_cpu_s": report["client_cpu_s"],
        "send_lag_p99_ms": report["send_lag_p99_ms"],
        "others": others,
    }


def flooding(options: argparse.Namespace, half: float) -> Profile:
    """The loud key's rate: as the other's, then `flood` times its half of the capacity, then as the other's again."""
    low, high, length = options.base * half, options.flood * half, options.seconds
    return ((0, low), (length, low), (length, high), (2 * length, high), (2 * length, low), (3 * length, low))


def phases(samples: Samples, length: float) -> dict[str, dict[str, Any]]:
    """By phase and key. A phase's first second is left out, in which the queues settle."""
    found: dict[str, dict[str, Any]] = {}
    for number, phase in enumerate(("before", "flood", "after")):
        begin, end = number * length + 1.0, (number + 1) * length
        inside = samples.where((samples.due >= begin) & (samples.due < end))
        found[phase] = {tag: summarize(inside.where(inside.of(tag)), end - begin) for tag in samples.tags}
    return found


def broken_promises(report: Mapping[str, Any]) -> list[str]:
    before, flood = report["phases"]["before"][QUIET], report["phases"]["flood"][QUIET]
    broken = []
    if flood["p99_ms"] is None or flood["p99_ms"] >= MORE * before["p99_ms"]:
        broken.append(f"the quiet key's p99 went from {before['p99_ms']} to {flood['p99_ms']} ms")
    refused = flood["statuses"].get("429", 0)
    if refused > REFUSED * flood["requests"]:
        broken.append(f"{refused} of the quiet key's {flood['requests']} requests were refused during the flood")
    for phase, keys in report["phases"].items():
        for key, row in keys.items():
            others = {status: count for status, count in row["statuses"].items() if status not in ENDINGS}
            broken += [f"{phase}, {key}: {count} x status {status}" for status, count in others.items()]
    return broken


def table(report: Mapping[str, Any]) -> Table:
    made = Table(f"capacity {report['capacity_rps']:.0f}/s")
    for name in ("key", "sent/s", "answered/s", "p50 ms", "p99 ms", "429", "429 p99 ms"):
        made.add_column(name, justify="right")
    for phase, keys in report["phases"].items():
        for key, row in keys.items():
            sent = row["requests"] / row["window_s"]
            refusals = row.get("refused", {})
            cells = (row["rps"], row["p50_ms"], row["p99_ms"], row["statuses"].get("429", 0), refusals.get("p99_ms"))
            made.add_row(phase, key, f"{sent:.0f}", *("" if cell is None else str(cell) for cell in cells))
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--level", type=level, default="exact", help="the quality class: a share, or exact")
    parser.add_argument("--flood", type=float, default=10.0, help="times its half of the capacity")
    parser.add_argument("--base", type=float, default=0.8, help="of its half, what each key sends before")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the three phases")
    parser.add_argument("--objective-ms", type=float, default=100.0, help="of the gears")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def level(text: str) -> float | str:
    return text if text == "exact" else float(text)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
