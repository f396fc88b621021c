"""A load that rises from a tenth of the reference's capacity to three times of it and falls again, in four classes.

The capacity is measured first: a closed loop of `exact` requests. Then an open loop with Poisson arrivals follows the
ramp, a fifth of it `exact`, the rest spread over the other classes; then the same ramp again with `exact` requests
alone, which shows where the reference would collapse. The exit status is 1 if a request left its class, if more answers
changed than a class promises, if gears oscillate, or if the classes do not hold their objective far beyond the
reference's end.

    python -m benchmarks.ramp build/sections-standard --svg benchmarks/ramp.svg
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.answers import above_bound, compare, outside_class, reference_labels
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.meter import Meter
from benchmarks.processes import Server
from benchmarks.ramp_plot import Drawing, draw
from benchmarks.seconds import Seconds, by_second, held_until, shifts
from deployments.fastpath import free_port
from fettle.bench.arrivals import Profile, rate_at, scaled
from fettle.bench.crew import run_apart, sampled
from fettle.bench.load import TEXTS, LoadPlan
from fettle.bench.samples import Samples, quantiles
from fettle.bench.traffic import Flow
from fettle.family import Family

LOG = Path("build/benchmark-logs/ramp.log")
KEPT = tuple(f"x-fettle-{name}" for name in ("class", "point", "bound", "variant", "gear", "degraded"))
EXACT = "exact"
ENDINGS = (200, 429, 504)
FAR = 2.0  # times the load at which the reference alone fails its objective
MOST_TURNS = 3  # up and down is one; a return that was too early is two more


@dataclass(frozen=True, slots=True)
class Ramp:
    """One ramp: what was sent and seen. `others` is the machine's share that went to other programs."""

    flows: tuple[Flow, ...]
    profile: Profile
    samples: Samples
    report: Mapping[str, Any]
    others: float


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    say("answers of the reference")
    labels = reference_labels(options.family, options.texts, machine["cores"])
    capacity, mixed, alone = run(options, machine["cores"])
    report = summarize(options, capacity, mixed, alone, labels)
    if options.svg:
        options.svg.write_text(draw(drawing(options, capacity, mixed, alone)), encoding="utf-8")
    if not options.json:
        Console(width=140).print(table(report))
        for line in report["broken_promises"]:
            print(f"BROKEN: {line}")
    names = ("objective_ms", "bottom", "top", "seconds", "exact_share", "levels", "seed")
    settings = {name: getattr(options, name) for name in names} | {"family": options.family.name}
    print(json.dumps({"benchmark": "ramp", "hardware": machine, "settings": settings} | report))
    sys.exit(1 if report["broken_promises"] else 0)


def run(options: argparse.Namespace, cores: int) -> tuple[float, Ramp, Ramp]:
    """The reference's requests a second, the ramp in all classes, and the ramp of `exact` alone, at one server."""
    name = Family.open(options.family).name
    with tempfile.TemporaryDirectory() as scratch:
        config = service.config(options.family, cores, Path(scratch), objective_ms=options.objective_ms)
        spec = service.spec(config, free_port(), "/classify", name)
        plan = LoadPlan(spec.url, name, texts=options.texts, kind="classify", seed=options.seed, keep=KEPT, labels=True)
        with Server(spec, LOG) as server:
            say("capacity of the reference")
            exact = (Flow(EXACT, max_disagreement=EXACT),)
            closed = replace(plan, flows=exact, connections=32, warm_up=5.0, seconds=options.calibrate)
            capacity = float(run_apart(closed)["rps"])
            profile = scaled(shape(options), capacity)
            ramps = []
            for flows in (mixed_flows(options, profile), (replace(exact[0], profile=profile),)):
                say(f"ramp to {options.top:.0%} of {capacity:.0f} requests/s: {', '.join(flow.tag for flow in flows)}")
                time.sleep(options.pause)
                open_loop = replace(
                    plan, flows=flows, seconds=options.seconds, warm_up=0.0, samples=Path(scratch, "samples.npz")
                )
                meter = Meter(server)
                report, samples = sampled(open_loop, meter.read)
                ramps.append(Ramp(flows, profile, samples, report, meter.window(cores).others(report)))
    return capacity, ramps[0], ramps[1]


def shape(options: argparse.Namespace) -> Profile:
    """Shares of the capacity over time: up, and down again."""
    return ((0.0, options.bottom), (options.seconds / 2, options.top), (options.seconds, options.bottom))


def mixed_flows(options: argparse.Namespace, profile: Profile) -> tuple[Flow, ...]:
    each = (1 - options.exact_share) / len(options.levels)
    exact = Flow(EXACT, profile=scaled(profile, options.exact_share), max_disagreement=EXACT)
    rest = [Flow(percent(level), profile=scaled(profile, each), max_disagreement=level) for level in options.levels]
    return (exact, *rest)


def percent(level: float) -> str:
    return f"{100 * level:g} %"


def summarize(
    options: argparse.Namespace, capacity: float, mixed: Ramp, alone: Ramp, labels: Sequence[str]
) -> dict[str, Any]:
    reference = Family.open(options.family).manifest.reference
    answers = compare(mixed.samples, labels, options.seed)
    half = options.seconds / 2
    promises = {EXACT: 0.0} | {percent(level): level for level in options.levels}
    series = [by_second(mixed.samples, flow.tag, int(options.seconds)) for flow in mixed.flows]
    classes: dict[str, dict[str, Any]] = {}
    for found in series:
        mine = mixed.samples.where(mixed.samples.of(found.tag))
        good = mine.where(mine.good)
        shifted = shifts(found.gear)
        classes[found.tag] = {
            "offered": len(mine),
            "answered": len(good),
            "refused": int((mine.status == 429).sum()),
            "other": int((~np.isin(mine.status, ENDINGS)).sum()),
            **quantiles(good.ms),
            "in_time": float((good.ms <= options.objective_ms).sum() / max(1, len(mine))),
            "held_to": held_load(options, mixed, found.tag, half),
            "changed": answers[found.tag].share,
            "gear_changes": shifted.changes,
            "gear_turns": shifted.turns,
        }
    collapse = held_load(options, alone, EXACT, half)
    good = alone.samples.where(alone.samples.good)
    alone_report = {
        "held_to": collapse,
        "answered": len(good),
        "offered": len(alone.samples),
        "refused": int((alone.samples.status == 429).sum()),
        **quantiles(good.ms),
    }
    broken = outside_class(mixed.samples, mixed.flows, reference)
    broken += above_bound(answers, promises, sampled=True)
    for tag, row in classes.items():
        if row["other"]:
            broken.append(f"class {tag}: {row['other']} requests ended in something else than 200, 429 or 504")
        if row["gear_turns"] > MOST_TURNS:
            broken.append(f"class {tag}: the gear turned {row['gear_turns']} times on one rise and fall")
        if tag != EXACT and row["held_to"] < min(FAR * collapse, options.top):
            broken.append(
                f"class {tag}: held {options.objective_ms:g} ms up to {row['held_to']:.0%} of the reference's "
                f"capacity, which alone held it up to {collapse:.0%}"
            )
    return {
        "capacity_rps": capacity,
        "classes": classes,
        "alone": alone_report,
        "others": {"mixed": mixed.others, "alone": alone.others},
        "send_lag_p99_ms": mixed.report["send_lag_p99_ms"],
        "seconds": [asdict(found) for found in series],
        "broken_promises": broken,
    }


def held_load(options: argparse.Namespace, ramp: Ramp, tag: str, half: float) -> float:
    """Up to which share of the capacity, on the way up, the flow's p99 stayed within the objective."""
    until = held_until(ramp.samples, tag, options.objective_ms, half)
    return rate_at(shape(options), half - 1e-6 if until is None else max(0.0, until))


def drawing(options: argparse.Namespace, capacity: float, mixed: Ramp, alone: Ramp) -> Drawing:
    seconds = int(options.seconds)
    series: list[Seconds] = [by_second(mixed.samples, flow.tag, seconds) for flow in mixed.flows]
    return Drawing(
        capacity=capacity,
        objective_ms=options.objective_ms,
        classes=series,
        alone=by_second(alone.samples, EXACT, seconds),
    )


def table(report: Mapping[str, Any]) -> Table:
    made = Table(f"capacity {report['capacity_rps']:.0f} requests/s")
    columns = ("offered", "answered", "refused", "p50 ms", "p99 ms", "in time", "held to", "changed", "gear changes")
    for name in columns:
        made.add_column(name, justify="right")
    for tag, row in report["classes"].items():
        made.add_row(
            tag,
            *(str(row[name]) for name in ("offered", "answered", "refused", "p50_ms", "p99_ms")),
            f"{row['in_time']:.1%}",
            f"{row['held_to']:.0%}",
            f"{row['changed']:.2%}",
            str(row["gear_changes"]),
        )
    row = report["alone"]
    cells = (str(row[name]) for name in ("offered", "answered", "refused", "p50_ms", "p99_ms"))
    made.add_row("exact alone", *cells, "", f"{row['held_to']:.0%}", "", "")
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ramp", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--objective-ms", type=float, default=250.0, help="what the gears try to keep")
    parser.add_argument("--bottom", type=float, default=0.1, help="share of the reference's capacity at both ends")
    parser.add_argument("--top", type=float, default=3.0, help="share of the reference's capacity in the middle")
    parser.add_argument("--seconds", type=float, default=120.0, help="of one ramp, up and down")
    parser.add_argument("--calibrate", type=float, default=10.0, help="seconds to find the capacity in")
    parser.add_argument("--pause", type=float, default=8.0, help="seconds of rest before each ramp")
    parser.add_argument("--exact-share", type=float, default=0.2)
    parser.add_argument("--levels", type=levels, default="0.01,0.02,0.05", help="the other classes, in equal parts")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="draw the ramp into this file")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def levels(text: str) -> list[float]:
    return [float(level) for level in text.split(",") if level]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
