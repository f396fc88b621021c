"""Twice the load that can be borne, with mixed deadlines: how many requests are answered in time.

Live, over HTTP: an open loop at a multiple of the measured capacity, a part of the requests for each deadline, a reply
counting if the client has it in time. And in simulation: arrivals from the same generator, the same texts, the router's
own queue with the costs that it predicts against the times that the rows really take, beside three others: the same
queue as an oracle, told each row's time as it arrives; a scheduler that knows the times as well and chooses for number
alone, giving up long texts for short ones ("most rows"); and plain order of arrival. For one variant, whose times
follow the length of a text, and for the point of the class, whose times also depend on where a row leaves. The exit
status is 1 if the router's queue answers less than 90 % of what the oracle does in time, or little more than plain
order, or if a live request ends in anything but 200, 408, 429 or 504.

    python -m benchmarks.deadlines build/sections-standard
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.meter import Meter
from benchmarks.processes import Server
from benchmarks.simulation import InOrder, Job, Machine, MostRows, Outcome, RouterPolicy, ideal, most_possible, simulate
from deployments.fastpath import free_port
from fettle.bench.crew import run_apart, sampled
from fettle.bench.load import TEXTS, LoadPlan, schedule
from fettle.bench.samples import quantiles
from fettle.bench.texts import read_texts, shuffled
from fettle.bench.traffic import Flow
from fettle.config import BatchConfig
from fettle.costs import CALL_MS, batch_tokens, work_shares
from fettle.family import Family
from fettle.latency import estimate_ms
from fettle.manifest import OperatingPoint
from fettle.points import answer, choose_point, whole
from fettle.rows import Row
from fettle.scheduling import BatchBounds
from fettle.tokenizer import Tokenizer
from workers.engine import Engine, EngineOptions, open_engine

LOG = Path("build/benchmark-logs/deadlines.log")
REPEATS = 3
OF_ORACLE, OF_FIFO = 0.9, 1.5
# 408 is how Serve itself ends a request that the router has not answered at its deadline.
ENDINGS = {200, 408, 429, 504}


@dataclass(frozen=True, slots=True)
class Work:
    """Of each text, in the order of the file: tokens, and what the router predicts and the engines took, in ms."""

    lengths: Sequence[int]
    predicted_ms: Sequence[float]
    true_ms: Sequence[float]
    tokens: int

    @property
    def rows_a_call(self) -> float:
        return max(1.0, self.tokens / statistics.fmean(self.lengths))


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    family = Family.open(options.family)
    point = choose_point(family.manifest.points, options.level)
    if point is None:
        sys.exit(f"the family has no operating point at {options.level:g}; choose another --level")
    live = run_live(options, family, machine["cores"]) if options.live else None
    ways = {options.variant: alone(family, options.variant), point.id: point}
    simulated = {name: run_simulated(options, family, way, machine["cores"]) for name, way in ways.items()}
    broken = [line for name, found in simulated.items() for line in broken_simulated(name, found)]
    broken += broken_live(live) if live else []
    if not options.json:
        console = Console(width=120)
        if live:
            console.print(live_table(live, options.deadlines_ms))
        for name, found in simulated.items():
            console.print(simulated_table(name, found))
        for line in broken:
            print(f"BROKEN: {line}")
    names = (
        "level",
        "variant",
        "factor",
        "seconds",
        "deadlines_ms",
        "objective_ms",
        "simulated_seconds",
        "seeds",
        "seed",
    )
    settings = {name: getattr(options, name) for name in names} | {"family": options.family.name, "point": point.id}
    head = {"benchmark": "deadlines", "hardware": machine, "settings": settings}
    print(json.dumps(head | {"live": live, "simulated": simulated, "broken_promises": broken}))
    sys.exit(1 if broken else 0)


def flows(options: argparse.Namespace, *, timed: bool = True) -> tuple[Flow, ...]:
    """One for each deadline, all of one size; without `timed` the deadlines stay with the client."""
    return tuple(
        Flow(f"{ms:g} ms", max_disagreement=options.level, timeout_s=ms / 1000 if timed else None)
        for ms in options.deadlines_ms
    )


def run_live(options: argparse.Namespace, family: Family, cores: int) -> dict[str, Any]:
    """Capacity, then the overload with deadlines that the server knows."""
    with tempfile.TemporaryDirectory() as scratch:
        config = service.config(options.family, cores, Path(scratch), objective_ms=options.objective_ms)
        spec = service.spec(config, free_port(), "/classify", family.name)
        plan = LoadPlan(spec.url, family.name, texts=options.texts, kind="classify", seed=options.seed)
        with Server(spec, LOG) as server:
            say("capacity")
            closed = replace(plan, flows=(Flow(max_disagreement=options.level),), connections=64, warm_up=8.0)
            capacity = float(run_apart(closed)["rps"])
            rate = options.factor * capacity
            say(f"{rate:.0f} requests/s with deadlines")
            meter = Meter(server)
            asked = flows(options)
            overload = replace(
                plan, flows=asked, rate=rate, seconds=options.seconds, samples=Path(scratch, "s.npz"), warm_up=3.0
            )
            report, samples = sampled(overload, meter.read)
            others = meter.window(cores).others(report)
    by_deadline: dict[str, dict[str, Any]] = {}
    for flow in asked:
        mine = samples.where(samples.of(flow.tag))
        in_time = mine.good & (mine.ms <= 1000 * (flow.timeout_s or 0.0))
        refused = mine.status != 200
        by_deadline[flow.tag] = {
            "requests": len(mine),
            "in_time": float(in_time.mean()),
            "late": float((mine.good & ~in_time).mean()),
            "refused": float(refused.mean()),
            "refused_p99_ms": quantiles(mine.ms[refused])["p99_ms"],
            **quantiles(mine.ms[mine.good]),
        }
    answered = sum(row["in_time"] * row["requests"] for row in by_deadline.values())
    return {
        "capacity_rps": capacity,
        "offered_rps": round(rate, 1),
        "in_time": answered / max(1, len(samples)),
        "in_time_of_capacity": answered / report["window_s"] / capacity,
        "statuses": report["statuses"],
        "deadlines": by_deadline,
        "send_lag_p99_ms": report["send_lag_p99_ms"],
        "others": others,
    }


def alone(family: Family, name: str) -> OperatingPoint:
    """One variant all the way, as if it were a point."""
    variant = family.variant(name)
    measured = variant.measured
    assert measured is not None
    return family.manifest.points[0].model_copy(
        update={"id": name, "steps": list(whole(variant)), "expected_cpu_ms": measured.row_cpu_ms or 0.0, "test": None}
    )


def run_simulated(options: argparse.Namespace, family: Family, point: OperatingPoint, cores: int) -> dict[str, Any]:
    """By policy: the share answered in time, and by deadline; means over the seeds."""
    say(f"what the rows really take at {point.id}")
    work = measure(family, point, read_texts(options.texts), options.objective_ms)
    # One place: a batch leaves when a replica is about to be free for it (`deployments.flights`).
    machine = Machine(cores, places=1, call_s=CALL_MS / 1000)
    row_s = statistics.fmean(work.true_ms) / 1000 + machine.call_s / work.rows_a_call
    capacity = cores / row_s
    config = BatchConfig()
    bounds = BatchBounds(rows=config.max_rows, tokens=work.tokens, max_age_s=config.max_age_ms / 1000)
    found: dict[str, list[Outcome]] = {"router": [], "oracle": [], "most rows": [], "in order": []}
    possible = []
    for seed in range(options.seed, options.seed + options.seeds):
        say(f"simulate, seed {seed}")
        jobs = jobs_of(options, work, options.factor * capacity, seed)
        found["router"].append(simulate(jobs, machine, RouterPolicy(bounds, machine, config.max_queue_s)))
        told = [replace(job, predicted_ms=job.true_ms) for job in jobs]
        found["oracle"].append(simulate(told, machine, RouterPolicy(bounds, machine, config.max_queue_s)))
        found["in order"].append(simulate(jobs, machine, InOrder(bounds, machine, config.max_queue_s)))
        eased, free = ideal(jobs, machine, work.rows_a_call)
        found["most rows"].append(simulate(eased, free, MostRows(free)))
        possible.append(most_possible(eased, free) / len(eased))
    shares = {name: _shares(outcomes, options.deadlines_ms) for name, outcomes in found.items()}
    router = shares["router"]["all"]
    return {
        "capacity_rps": capacity,
        "requests": len(found["router"][0].jobs),
        "true_ms": statistics.fmean(work.true_ms),
        "predicted_ms": statistics.fmean(work.predicted_ms),
        "in_time": shares,
        "most_possible": statistics.fmean(possible),
        "of_oracle": router / max(1e-9, shares["oracle"]["all"]),
        "of_most_rows": router / max(1e-9, shares["most rows"]["all"]),
        "of_in_order": router / max(1e-9, shares["in order"]["all"]),
    }


def jobs_of(options: argparse.Namespace, work: Work, rate: float, seed: int) -> list[Job]:
    """The requests that the load client would send, with the same seed and rate."""
    plan = LoadPlan("", "", flows=flows(options), rate=rate, seed=seed)
    order = shuffled(range(len(work.lengths)), seed)
    jobs = []
    for number, (at, flow, text) in enumerate(schedule(plan, len(order))):
        if at > options.simulated_seconds:
            break
        row = order[text]
        limit = options.deadlines_ms[flow] / 1000
        jobs.append(Job(number, at, at + limit, work.lengths[row], work.predicted_ms[row], work.true_ms[row]))
    return jobs


def measure(family: Family, point: OperatingPoint, texts: Sequence[str], objective_ms: float) -> Work:
    """Each text alone through the point, one thread, and scaled so that the mean is what a row takes in a batch."""
    rows = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode(list(texts))
    engines = {step.variant: open_engine(family.variant_path(step.variant), EngineOptions()) for step in point.steps}
    for engine in engines.values():
        engine.warm_up()
    took = [min(_spent(row, point, engines, family) for _ in range(REPEATS)) for row in rows]
    batched = point.test.cpu_ms_per_row if point.test else point.expected_cpu_ms
    scale = batched / statistics.fmean(took)
    tokens = _tokens(family, point, objective_ms)
    predicted = predict(family, point, rows, tokens)
    return Work([len(row) for row in rows], predicted, [ms * scale for ms in took], tokens)


def _spent(row: Row, point: OperatingPoint, engines: Mapping[str, Engine], family: Family) -> float:
    """Processor ms, since what else the machine does is no property of a row."""
    started = time.process_time()
    answer([row], point.steps, engines, family.manifest.task)
    return 1000 * (time.process_time() - started)


def predict(family: Family, point: OperatingPoint, rows: Sequence[Row], tokens: int) -> list[float]:
    """What the router expects of each row: its length in the latency tables, in the proportion that rows take part.

    A row's way through stages and steps is not known beforehand, so the point's mean cost is spread by length.
    """
    variant = family.variant(point.steps[0].variant)
    by_length = {}
    for length in {len(row) for row in rows}:
        size = max(1, tokens // length)
        assert variant.measured is not None
        by_length[length] = estimate_ms(variant.measured.latency, size, length) / size
    mean = statistics.fmean(by_length[len(row)] for row in rows)
    return [by_length[len(row)] * point.expected_cpu_ms / mean for row in rows]


def _tokens(family: Family, point: OperatingPoint, objective_ms: float) -> int:
    """Of a batch, as the router bounds it."""
    name = point.steps[0].variant
    measured = family.variant(name).measured
    assert measured is not None
    # A way of one whole variant has no share of its own: all of it runs.
    share = 1.0 if point.id == name else work_shares(family, list(family.variants))[name]
    return batch_tokens(measured.latency, objective_ms, share)


def _shares(outcomes: Sequence[Outcome], deadlines_ms: Sequence[float]) -> dict[str, float]:
    """In time of all, and of those with each deadline."""
    found = {"all": statistics.fmean(outcome.share for outcome in outcomes)}
    for ms in deadlines_ms:
        each = []
        for outcome in outcomes:
            mine = [job for job in outcome.jobs if abs(job.deadline - job.arrived - ms / 1000) < 1e-6]
            each.append(replace(outcome, jobs=mine).share)
        found[f"{ms:g} ms"] = statistics.fmean(each)
    return found


def broken_live(live: Mapping[str, Any]) -> list[str]:
    others = {status: count for status, count in live["statuses"].items() if status not in map(str, ENDINGS)}
    return [f"live: {count} x status {status}" for status, count in others.items()]


def broken_simulated(name: str, simulated: Mapping[str, Any]) -> list[str]:
    broken = []
    if simulated["of_oracle"] < OF_ORACLE:
        broken.append(f"simulated, {name}: in time is {simulated['of_oracle']:.0%} of what the oracle reaches")
    if simulated["of_in_order"] < OF_FIFO:
        broken.append(f"simulated, {name}: in time is only {simulated['of_in_order']:.2f} times plain order")
    return broken


def live_table(live: Mapping[str, Any], deadlines_ms: Sequence[float]) -> Table:
    made = Table(f"live, {live['offered_rps']:.0f} offered/s, capacity {live['capacity_rps']:.0f}/s")
    for name in ("requests", "in time", "late", "refused", "p50 ms", "p99 ms", "refused p99 ms"):
        made.add_column(name, justify="right")
    for ms in deadlines_ms:
        row = live["deadlines"][f"{ms:g} ms"]
        shares = (f"{row[name]:.1%}" for name in ("in_time", "late", "refused"))
        made.add_row(
            f"{ms:g} ms", str(row["requests"]), *shares, *(str(row[n]) for n in ("p50_ms", "p99_ms", "refused_p99_ms"))
        )
    made.add_row("all", "", f"{live['in_time']:.1%}", "", "", "", "", "")
    return made


def simulated_table(name: str, simulated: Mapping[str, Any]) -> Table:
    shares = simulated["in_time"]
    made = Table(f"simulated, {name}: in time of {simulated['requests']} requests")
    for name in shares["router"]:
        made.add_column(name, justify="right")
    for policy, row in shares.items():
        made.add_row(policy, *(f"{share:.1%}" for share in row.values()))
    made.add_row("bound of any schedule", f"{simulated['most_possible']:.1%}")
    made.caption = (
        f"router: {simulated['of_oracle']:.1%} of the oracle, {simulated['of_most_rows']:.1%} of most rows, "
        f"{simulated['of_in_order']:.1f} x plain order"
    )
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deadlines", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--level", type=float, default=0.01, help="the quality class of all requests")
    parser.add_argument("--variant", default="onnx-int8", help="the one before which the queue is simulated alone")
    parser.add_argument("--factor", type=float, default=2.0, help="times the capacity")
    parser.add_argument("--deadlines-ms", type=numbers, default="50,150,500,2000", help="in equal parts")
    parser.add_argument("--objective-ms", type=float, default=100.0, help="of the gears")
    parser.add_argument("--seconds", type=float, default=30.0, help="of live overload")
    parser.add_argument("--simulated-seconds", type=float, default=15.0)
    parser.add_argument("--seeds", type=int, default=3, help="simulations that figures are means of")
    parser.add_argument("--no-live", dest="live", action="store_false", help="simulate only")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
