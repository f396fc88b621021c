"""What serving costs on this machine now, for `benchmarks.plan_check`: engines alone, and the parts of a service.

    python -m benchmarks.plan_costs JSON

is one engine in a process of its own, which prints what its batches took.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.meter import Parts
from benchmarks.processes import Server
from fettle.bench.crew import measure
from fettle.bench.load import LoadPlan
from fettle.bench.texts import read_texts, shuffled
from fettle.config import ReplicaConfig
from fettle.family import Family
from fettle.manifest import Step
from fettle.menu import Menu
from fettle.plan.cell import ServingCosts
from fettle.plan.engine_time import batch_seconds
from fettle.plan.workload import stage_parts
from fettle.points import exits
from fettle.rows import Rows
from fettle.tokenizer import Tokenizer

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


def at_pace(found: Calibration, drift: float) -> Calibration:
    """The same on a machine that takes so many times as long for everything."""
    costs = ServingCosts(**{name: drift * cost for name, cost in asdict(found.costs).items()})
    paces = {name: drift * pace for name, pace in found.paces.items()}
    return replace(found, paces=paces, costs=costs, client_ms=drift * found.client_ms)


def main() -> None:
    print(json.dumps(asdict(engine_found(Asked(**json.loads(sys.argv[1]))))))


@dataclass(frozen=True, slots=True)
class Asked:
    """An engine that is to be measured: on these texts, and where it has exits with the gates of the cheapest point."""

    family: str
    variant: str
    threads: int
    texts: str
    seed: int


@dataclass(frozen=True, slots=True)
class Found:
    """What each batch took in ms, the lengths of its rows, and the stage that answered each."""

    ms: list[float]
    lengths: list[list[int]]
    stages: list[list[int]]


def pace_of(family: Family, asked: Asked, cores: int) -> float:
    """The engine's time over its table's, on batches of real texts, with as many at a time as there are cores for.

    What gates cost, and calls that a batch cannot fill, is in it as far as the table has it not.
    """
    command = [sys.executable, "-m", "benchmarks.plan_costs", json.dumps(asdict(asked))]
    clients = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(max(1, cores // asked.threads))
    ]
    found = [Found(**json.loads(client.communicate()[0])) for client in clients]
    parts = stage_parts(family, step_of(family, asked.variant))
    seconds = batch_seconds(family, asked.variant, ReplicaConfig(threads=asked.threads), 1.0 / asked.threads)
    predicted = sum(
        seconds([(length, parts[: stage + 1]) for length, stage in zip(lengths, stages, strict=True)])
        for each in found
        for lengths, stages in zip(each.lengths, each.stages, strict=True)
    )
    return sum(sum(each.ms) for each in found) / 1000 / predicted


def step_of(family: Family, variant: str) -> Step:
    """The variant's step in the cheapest point that has one; alone, through all of its stages, where none has."""
    steps = [step for point in family.manifest.points for step in point.steps if step.variant == variant]
    return steps[-1] if steps else Menu(family, [variant]).pinned(variant).stretches[0].step


def engine_found(asked: Asked, seconds: float = 2.0, rows: int = 12) -> Found:
    """Batches of texts through one engine, in this process."""
    from workers.engine import EngineOptions, open_engine

    family = Family.open(Path(asked.family))
    texts = shuffled(read_texts(Path(asked.texts)), asked.seed)[: 40 * rows]
    encoded = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode(texts)
    batches = [Rows.of(encoded[begin : begin + rows]) for begin in range(0, len(encoded), rows)]
    engine = open_engine(family.variant_path(asked.variant), EngineOptions(threads=asked.threads))
    engine.warm_up()
    step, found = step_of(family, asked.variant), Found([], [], [])
    begun = time.perf_counter()
    for batch in itertools.cycle(batches):
        started = time.perf_counter()
        outputs = engine.run(batch, exits(step, len(batch)))
        found.ms.append(1000 * (time.perf_counter() - started))
        found.lengths.append(batch.lengths.tolist())
        found.stages.append([0] * len(batch) if outputs.stages is None else outputs.stages.tolist())
        if time.perf_counter() - begun > seconds:
            break
    return found


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
    seconds = batch_seconds(family, PINNED, ReplicaConfig(threads=threads), 1.0 / threads)
    low = max(1, math.floor(rows))
    chance = random.Random(0)
    times = []
    for count in (low, low + 1):
        batches = [[(length, (1.0,)) for length in chance.choices(lengths, k=count)] for _ in range(200)]
        times.append(1000 * sum(map(seconds, batches)) / len(batches))
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
