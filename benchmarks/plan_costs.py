"""What serving costs on this machine now, for `benchmarks.plan_check`: engines alone, and the parts of a service.

    python -m benchmarks.plan_costs DIRECTORY THREADS LENGTHS

is one engine in a process of its own, which prints the ms of a call.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.meter import Parts
from benchmarks.processes import Server
from fettle.bench.crew import measure
from fettle.bench.load import LoadPlan
from fettle.family import Family
from fettle.latency import estimate_ms
from fettle.plan.cell import ServingCosts
from fettle.rows import CALL_TOKENS, Rows, engine_calls

PINNED = "onnx-int8"
# After a start or a load, until only what always goes on goes on; and how long that is then watched.
SETTLE_S, IDLE_S = 5.0, 8.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured before the loads. `paces` by variant: over its table; `client_ms` a request; `seen` by load."""

    paces: dict[str, float]
    costs: ServingCosts
    client_ms: float
    seen: dict[str, dict[str, float]]


def main() -> None:
    print(json.dumps(engine_ms(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))))


def pace_of(family: Family, name: str, threads: int, cores: int, lengths: Sequence[int]) -> float:
    """The engine's time over its table's, with as many at a time as there are cores for."""
    rows, length = 4, round(float(np.mean(lengths)))
    copies = max(1, cores // threads)
    command = [sys.executable, "-m", "benchmarks.plan_costs", str(family.variant_path(name)), str(threads)]
    clients = [
        subprocess.Popen([*command, json.dumps([length] * rows)], stdout=subprocess.PIPE, text=True)
        for _ in range(copies)
    ]
    took = [json.loads(client.communicate()[0]) for client in clients]
    measured = family.variant(name).measured
    assert measured is not None
    return float(np.mean(took)) / estimate_ms(measured.latency, rows, length)


def engine_ms(directory: Path, threads: int, lengths: Sequence[int], seconds: float = 1.0) -> float:
    """Mean time of a call of rows of these lengths, in this process."""
    from workers.engine import EngineOptions, open_engine

    engine = open_engine(directory, EngineOptions(threads=threads))
    engine.warm_up()
    counts = np.array(lengths, np.int32)
    rows = Rows(np.full(int(counts.sum()), 2000, np.int32), counts, None)
    engine.run(rows)
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        engine.run(rows)
        calls += 1
    return 1000 * (time.perf_counter() - begun) / calls


def calibrated(
    server: Server, plan: LoadPlan, family: Family, paces: Mapping[str, float], lengths: Sequence[int], threads: int
) -> Calibration:
    """Processor time by process: idle, with one client, and with many that share batches; all with a pinned variant."""
    pinned = replace(plan, model=f"{family.name}:{PINNED}", seconds=4.0, warm_up=1.0)
    measure(replace(pinned, connections=16, seconds=3.0))
    time.sleep(SETTLE_S)
    parts = Parts(server)
    before = parts.spent()
    time.sleep(IDLE_S)
    idle = {part: (spent - before[part]) / IDLE_S for part, spent in parts.spent().items()}
    one, many = (one_load(parts, replace(pinned, connections=count), idle) for count in (1, 32))
    # Router time a request: a + b x batches a request.
    batch = max(0.0, (one["router"] - many["router"]) / max(1e-6, one["batches"] - many["batches"]))
    request = max(0.1, one["router"] - batch * one["batches"])
    # What a batch takes of a replica is its engine's time and something for each batch. The engine is slower there than
    # alone in a process, so both are of the service: a batch of one row, and one of many.
    alone, full = (call_ms(family, lengths, 1 / load["batches"], threads) for load in (one, many))
    took, took_full = (load["replicas"] / load["batches"] for load in (one, many))
    slower = (took_full - took) / (full - alone) / threads / paces[PINNED] if full > alone else 1.0
    paces = {name: pace * slower for name, pace in paces.items()}
    engine = paces[PINNED] * alone
    replica = max(0.0, took - threads * engine)
    proxy = many["proxy"]
    wire = (one["mean_ms"] - engine - replica - batch - request - proxy - many["client"]) / 2
    costs = ServingCosts(
        proxy=proxy,
        intake=0.6 * request,
        reply=0.4 * request,
        batch=batch,
        replica=replica,
        beside=many["rest"],
        wire=max(0.0, wire),
        background=sum(idle.values()),
    )
    return Calibration(dict(paces), costs, many["client"], {"one": one, "many": many, "idle": idle})


def call_ms(family: Family, lengths: Sequence[int], rows: float, threads: int) -> float:
    """By the table, the mean time of a batch of so many rows of these lengths, which may lie between whole numbers."""
    measured = family.variant(PINNED).measured
    assert measured is not None
    low = max(1, math.floor(rows))
    chance = random.Random(0)
    times = []
    for count in (low, low + 1):
        batches = [chance.choices(lengths, k=count) for _ in range(200)]
        calls = [
            (max(batch[row] for row in call), len(call))
            for batch in batches
            for call in engine_calls(batch, threads * CALL_TOKENS)
        ]
        times.append(sum(estimate_ms(measured.latency, size, longest) for longest, size in calls) / len(batches))
    return times[0] + (rows - low) * (times[1] - times[0])


def one_load(server_parts: Parts, plan: LoadPlan, idle: Mapping[str, float]) -> dict[str, float]:
    """Of a closed loop, ms a request by part, idle time taken off; and batches a request."""
    seen: list[tuple[dict[str, float], tuple[int, int]]] = []
    found = measure(plan, on_window=lambda _: seen.append((server_parts.spent(), batches_of(plan.url))))
    (opened, (rows, batches)), (closed, (rows_then, batches_then)) = seen
    count = max(1, rows_then - rows)
    parts = {part: max(0.0, closed[part] - opened[part] - idle[part] * found.window_s) for part in closed}
    client = sum(each["client_cpu_s"] for each in found.clients)
    inside = found.inside
    return {
        **{part: 1000 * spent / count for part, spent in parts.items()},
        "client": 1000 * client / len(inside),
        "batches": (batches_then - batches) / count,
        "mean_ms": float(inside.ms[inside.good].mean()),
    }


def batches_of(url: str) -> tuple[int, int]:
    """Rows and batches of the pinned variant so far."""
    with urllib.request.urlopen(f"{url.removesuffix('/classify')}/info", timeout=30) as reply:
        variants = json.load(reply)["families"][0]["variants"]
    mine = next(variant for variant in variants if variant["id"] == PINNED)
    return mine["rows"], mine["batches"]


if __name__ == "__main__":
    main()
