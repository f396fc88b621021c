"""A day's traffic compressed into minutes, in simulated time: the product's policy, an oracle, and Ray's own policy.

Three variants in a cascade and the routers. The oracle knows every arrival, starts replicas in time, and holds the same
latency objective with as few as it can; replica-seconds count from when a replica is asked for until it is gone. Then
ten such families with 1,000 replicas: what a decision costs. The exit status is 1 if the policy misses what it is for.
How many real replicas a machine carries is `benchmarks.many_replicas`.

    python -m benchmarks.autoscaling --svg benchmarks/autoscaling.svg
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.serve.config import AutoscalingConfig
from rich.console import Console
from rich.table import Table

from benchmarks.autoscaling_plot import Curves, draw
from benchmarks.fleet import ROUTERS, Fleet, Kind, Scene, Stream, Trace
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.scalers import FINE, Fettle, Ray, oracle, reporting_ms
from benchmarks.seconds import shifts
from fettle.bench.arrivals import Profile

# (hour, part of the peak): a valley at night, a ramp in the morning, a dip at lunch, a peak in the evening.
DAY = (
    (0, 0.30), (2, 0.17), (4, 0.12), (6, 0.22), (8, 0.62), (10, 0.88), (11.5, 0.92), (12.5, 0.72), (13.5, 0.74),
    (15, 0.90), (17, 0.84), (18.5, 0.86), (20, 1.0), (21, 0.94), (22.5, 0.60), (24, 0.30),
)  # fmt: skip
# The flash crowd: at this hour, within so many seconds, so much more; then it goes as fast as the evening does.
FLASH_HOUR, FLASH_RISE_S, FLASH_TIMES, FLASH_HOLD_S = 16.0, 5.0, 2.0, 60.0
REACTION_S = 10.0  # beside what a start takes: to see it, to decide, to drain what has come by then
ORACLE = "an oracle"
MOST_OVER = 1.15
LEAST_GOOD = 0.99
# Of the curve: down at night, up, lunch, up, down after the crowd, up, down.
DAY_TURNS = 6
# For 1,000 replicas: up within three minutes, and again as many after.
CROWD: Profile = ((0.0, 150.0), (180.0, 1200.0), (300.0, 1200.0), (400.0, 400.0), (500.0, 400.0))
WAYS = (
    Stream(0.80, (("student", 1.0), ("int8", 0.25), ("fp32", 0.02))),
    Stream(0.12, (("int8", 1.0), ("fp32", 0.05))),
    Stream(0.08, (("fp32", 1.0),)),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One policy on the day. `good`: share of the requests within the objective, outside the reaction time.

    `turns`: how often numbers turned from growing to shrinking or back, by deployment.
    """

    name: str
    good: float
    good_always: float
    refused: int
    replica_s: float
    changes: int
    turns: dict[str, int]


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    report = run(options)
    if not options.json:
        console = Console(width=140)
        console.print(table(report["day"]))
        print(", ".join(f"{name} {value:g}" for name, value in report["many"].items()))
        for line in report["missed"]:
            print(f"MISSED: {line}")
    names = ("hour", "peak", "start", "objective_ms", "seed", "families")
    settings = {name: getattr(options, name) for name in names}
    print(json.dumps({"benchmark": "autoscaling", "hardware": machine, "settings": settings} | report))
    sys.exit(1 if report["missed"] else 0)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hour", type=float, default=120.0, help="seconds that an hour takes")
    parser.add_argument("--peak", type=float, default=500.0, help="requests a second in the evening")
    parser.add_argument("--start", type=float, default=10.0, help="seconds that a replica takes to start")
    parser.add_argument("--objective-ms", type=float, default=500.0, help="time in the system")
    parser.add_argument("--families", type=int, default=10, help="of the run with 1,000 replicas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--svg", type=Path, help="where to draw the day")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    stage = scene(options)
    begin = first_second(stage)
    say("the day, by the product's policy")
    traces = {"Fettle": Fleet(stage, Fettle(), begin).run()}
    say("the oracle's plan")
    traces[ORACLE] = oracles(stage, begin)
    for name, config, calls in rays():
        say(name)
        traces[name] = Fleet(stage, Ray(config, calls=calls), begin).run()
    results = [summarize(name, trace, stage, options) for name, trace in traces.items()]
    if options.svg:
        colours = dict(zip(traces, ("1", "0", "alone", "3"), strict=True))
        options.svg.write_text(draw(Curves(options.hour, work_of(traces["Fettle"]), traces, colours)), encoding="utf-8")
    say("1,000 replicas")
    crowd = many(options)
    return {"day": [asdict(each) for each in results], "many": crowd, "missed": missed(results)}


def rays() -> list[tuple[str, AutoscalingConfig, bool]]:
    """Ray's policy with its own defaults, which count requests; and as this product set it before, counting batches."""
    before = AutoscalingConfig(
        min_replicas=1, max_replicas=1000, target_ongoing_requests=1.0,
        upscale_delay_s=2.0, downscale_delay_s=60.0, look_back_period_s=15.0,
    )  # fmt: skip
    return [
        ("Ray, its defaults", AutoscalingConfig(min_replicas=1, max_replicas=1000), False),
        ("Ray, set for batches", before, True),
    ]


def scene(options: argparse.Namespace) -> Scene:
    profile = day(options.hour, options.peak)
    return Scene(kinds(options.start), WAYS, profile, options.objective_ms / 1000, seed=options.seed)


def kinds(start_s: float, family: str = "", slower: float = 1.0) -> dict[str, Kind]:
    """The variants of one family; `slower` models take so many times as long."""
    made = [
        Kind(f"{family}student", row_s=0.020 * slower, start_s=start_s, batch_s=0.1 * slower),
        Kind(f"{family}int8", row_s=0.050 * slower, start_s=start_s, batch_s=0.1 * slower),
        Kind(f"{family}fp32", row_s=0.120 * slower, start_s=start_s, batch_s=0.2 * slower),
    ]
    return {kind.name: kind for kind in made}


def day(hour_s: float, peak: float) -> Profile:
    """Requests a second over the day, with the flash crowd on top."""
    flash = FLASH_HOUR * hour_s
    crowd = [(flash, 1.0), (flash + FLASH_RISE_S, FLASH_TIMES), (flash + FLASH_RISE_S + FLASH_HOLD_S, FLASH_TIMES)]
    crowd.append((crowd[-1][0] + hour_s, 1.0))
    hours, parts = zip(*DAY, strict=True)
    at = sorted({hour * hour_s for hour in hours} | {second for second, _ in crowd})
    base = np.interp(at, [hour * hour_s for hour in hours], parts)
    times = np.interp(at, *zip(*crowd, strict=True))
    return tuple((float(second), float(peak * one * more)) for second, one, more in zip(at, base, times, strict=True))


def first_second(stage: Scene) -> dict[str, int]:
    """What the load at the beginning needs, with room, so that nobody's start counts."""
    first = stage.profile[0][1]
    begin = {ROUTERS: math.ceil(first * stage.router_s / 0.7)}
    shares = sum(stream.share for stream in stage.streams)
    for name, kind in stage.kinds.items():
        rows = sum(stream.share * reach for stream in stage.streams for step, reach in stream.way if step == name)
        begin[name] = math.ceil(first * rows / shares * kind.row_s / 0.7)
    return begin


def oracles(stage: Scene, begin: Mapping[str, int]) -> Trace:
    """The cheapest plan that holds the objective; how long its rows may wait is found by bisection."""
    work = work_by_part(stage)
    low, high, best = 0.0, stage.objective_s, None
    for _ in range(5):
        patience = (low + high) / 2
        trace = Fleet(stage, oracle(stage, work, patience), begin).run()
        if sum(trace.good) >= LEAST_GOOD * sum(trace.came):
            low, best = patience, trace
        else:
            high = patience
    if best is None:
        raise RuntimeError("no plan of the oracle holds the objective; is it shorter than a batch?")
    return best


def work_by_part(stage: Scene) -> dict[str, list[float]]:
    """Seconds of work that come at each variant in each part of a second, full batches' calls included."""
    found = {name: [0.0] * (stage.seconds * FINE) for name in [*stage.kinds, ROUTERS]}
    calls = {name: 1 + kind.call_s / kind.batch_s for name, kind in stage.kinds.items()}
    for request in stage.requests():
        part = int(request.at * FINE)
        found[ROUTERS][part] += stage.router_s
        for name, cost in request.goes:
            found[name][part] += cost * calls[name]
    return found


def summarize(name: str, trace: Trace, stage: Scene, options: argparse.Namespace) -> Result:
    came, good = np.array(trace.came), np.array(trace.good)
    seconds = np.arange(stage.seconds)
    flash = FLASH_HOUR * options.hour
    calm = (seconds < flash) | (seconds >= flash + options.start + REACTION_S)
    turned = {deployment: shifts(numbers) for deployment, numbers in trace.wanted.items()}
    return Result(
        name=name,
        good=float(good[calm].sum() / came[calm].sum()),
        good_always=float(good.sum() / came.sum()),
        refused=sum(trace.refused),
        replica_s=sum(trace.replica_s.values()),
        changes=sum(each.changes for each in turned.values()),
        turns={deployment: each.turns for deployment, each in turned.items()},
    )


def missed(results: Sequence[Result]) -> list[str]:
    """What the policy is for and does not do."""
    own, best = (next(each for each in results if each.name == name) for name in ("Fettle", ORACLE))
    said = []
    if own.good < LEAST_GOOD:
        said.append(f"{100 * own.good:.2f} % of the requests within the objective")
    if own.replica_s > MOST_OVER * best.replica_s:
        said.append(f"{own.replica_s / best.replica_s:.3f} times the oracle's replica-seconds")
    if max(own.turns.values()) > DAY_TURNS:
        said.append(f"the load turns {DAY_TURNS} times, numbers {own.turns}")
    return said


def work_of(trace: Trace) -> list[float]:
    """Replicas that the work of each second keeps busy."""
    return [float(second) for second in np.diff(np.sum(list(trace.work.values()), axis=0), append=np.nan)[:-1]] + [0.0]


def many(options: argparse.Namespace) -> dict[str, float]:
    """Families of slow models that grow to 1,000 replicas: how long one decision on all of them takes."""
    names = [f"{number}." for number in range(options.families)]
    slower, share = 20.0, 1.0 / options.families
    stages = {name: kind for family in names for name, kind in kinds(options.start, family, slower).items()}
    streams = [
        Stream(share * stream.share, tuple((family + step, reach) for step, reach in stream.way))
        for family in names
        for stream in WAYS
    ]
    stage = Scene(stages, streams, CROWD, slower * options.objective_ms / 1000, 2 * slower, seed=options.seed)
    policy = Fettle()
    trace = Fleet(stage, policy, first_second(stage)).run()
    took = 1000 * np.array(policy.took_s)
    return {
        "deployments": len(trace.wanted),
        "most replicas": int(np.sum(list(trace.wanted.values()), axis=0).max()),
        "within objective, %": round(100 * sum(trace.good) / sum(trace.came), 2),
        "decision p50 ms": round(float(np.median(took)), 3),
        "decision p99 ms": round(float(np.quantile(took, 0.99)), 3),
        "report p50 ms": round(reporting_ms(list(trace.wanted)), 3),
    }


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    made = Table(title="A day, compressed", title_justify="left")
    made.add_column("policy")
    columns = ("in time, %", "crowd too, %", "refused", "replica-seconds", "of the oracle's, %", "changes", "turns")
    for column in columns:
        made.add_column(column, justify="right")
    least = next(each["replica_s"] for each in results if each["name"] == ORACLE)
    for each in results:
        made.add_row(
            each["name"],
            f"{100 * each['good']:.2f}",
            f"{100 * each['good_always']:.2f}",
            f"{each['refused']:,}",
            f"{each['replica_s']:,.0f}",
            f"{100 * each['replica_s'] / least:.1f}",
            str(each["changes"]),
            "/".join(map(str, each["turns"].values())),
        )
    return made


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
