"""What the way through the product costs where the engine costs nothing: HTTP, keys, admission, queue, Ray and back.

Engines without a model. Rows: a closed loop at each number of connections, with requests a second, latencies, and
processor time per request. Text: so many streams of an engine that sleeps for each step, with processor time per
token. All is told by who spent it: proxy, routers, replicas, the rest of Ray, and the client.

    python -m benchmarks.serving_path [--connections 1,8,64,512] [--streams 1,8,32] [--routers 1]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.meter import Parts
from benchmarks.processes import Server, ServerSpec
from deployments.fastpath import free_port
from fettle.bench.crew import measure
from fettle.bench.figures import figures
from fettle.bench.load import LoadPlan
from fettle.bench.traffic import Flow
from fettle.config import ServeConfig, TextConfig
from fettle.family import Family
from fettle.generation import Prompt, Sampling
from tests.fakes import FakeVariant, make_fake_family
from tests.texts import make_text_family
from workers.engine import EngineOptions, open_runner
from workers.generator import Generator

LOGS = Path("build/benchmark-logs")
KEY = "a-key-of-this-benchmark"
ROWS, TEXT = "rows", "text"
TOKENS_OUT = 128
CACHE_BYTES = 1 << 28
SETTLE_S = 5.0
# As `benchmarks.meter.Parts` names them; the last is all else of Ray.
PARTS = ("router", "replicas", "proxy", "rest")


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    results = []
    with tempfile.TemporaryDirectory(prefix="fettle-path-") as scratch:
        if options.connections:
            results += measured_rows(options, Path(scratch))
        if options.streams:
            results += measured_text(options, Path(scratch))
    if not options.json:
        Console(width=140).print(table(results, ROWS, "request"))
        Console(width=140).print(table(results, TEXT, "token"))
    settings = {"seconds": options.seconds, "routers": options.routers, "step_ms": options.step_ms}
    print(json.dumps({"benchmark": "serving_path", "hardware": machine, "settings": settings, "results": results}))


def measured_rows(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    make_fake_family(scratch / ROWS, name=ROWS, variants=[FakeVariant("none")])
    spec = spec_of(options, scratch, ROWS, "/classify", {"input": "Are you there?"})
    plan = LoadPlan(spec.url, ROWS, kind="classify", synthetic=(8, 24), seconds=options.seconds, flows=(with_key(),))
    with Server(spec, LOGS / "serving-path-rows.log") as server:
        parts = settled(server)
        return [{"kind": ROWS, "at_a_time": number, **measured(parts, plan, number)} for number in options.connections]


def measured_text(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    variant = FakeVariant("none", ms_per_call=options.step_ms)
    make_text_family(scratch / TEXT, name=TEXT, context=1024, variants=[variant])
    spec = spec_of(options, scratch, TEXT, "/v1/completions", {"prompt": "Are you there?", "max_tokens": 2})
    plan = LoadPlan(
        spec.url,
        TEXT,
        kind="completions",
        synthetic=(4, 8),
        seconds=options.seconds,
        flows=(with_key(),),
        max_tokens=(TOKENS_OUT, TOKENS_OUT),
        body={"temperature": 0.0, "ignore_eos": True},
    )
    alone = {number: engine_us(scratch / TEXT, number) for number in options.streams}
    with Server(spec, LOGS / "serving-path-text.log") as server:
        parts = settled(server)
        return [
            {"kind": TEXT, "at_a_time": number, "engine_us": alone[number], **measured(parts, plan, number)}
            for number in options.streams
        ]


def engine_us(family: Path, streams: int) -> float:
    """Processor microseconds for each token of the generator alone, with so many texts at a time: a replica's part
    that is not the way's.
    """
    runner = open_runner(Family.open(family).variant_path("none"), EngineOptions())
    generator = Generator(runner, CACHE_BYTES, max_slots=streams)
    greedy, ids = Sampling(temperature=0.0), np.arange(40, dtype=np.int32)
    for number in range(streams):
        generator.submit(Prompt(str(number), ids + number, TOKENS_OUT, greedy))
    tokens, began = 0, time.process_time()
    while generator.busy:
        tokens += sum(len(step.tokens) for step in generator.step())
    return round(1e6 * (time.process_time() - began) / tokens, 1)


def with_key() -> Flow:
    return Flow(key=KEY)


def spec_of(
    options: argparse.Namespace, scratch: Path, family: str, path: str, probe: Mapping[str, object]
) -> ServerSpec:
    settings: ServeConfig = service.config(
        scratch / family,
        1,
        scratch / "evidence",
        share=0.0,
        routers=options.routers,
        api_keys=[KEY],
        text=TextConfig(slots=max(options.streams, default=1)),
    )
    spec = service.spec(settings, free_port(), path, family, key=KEY)
    return ServerSpec(spec.command, spec.url, json.dumps({"model": family, **probe}).encode(), headers=spec.headers)


def settled(server: Server) -> Parts:
    time.sleep(SETTLE_S)
    return Parts(server)


def measured(parts: Parts, plan: LoadPlan, connections: int) -> dict[str, Any]:
    """One load's figures, and processor microseconds for each request, or token of text, by part."""
    say(f"{connections} at a time")
    seen: list[dict[str, float]] = []
    crew = measure(replace(plan, connections=connections), on_window=lambda _: seen.append(parts.spent()))
    opened, closed = seen
    found = figures(crew)
    count = found["requests"] if plan.kind == "classify" else found["tokens_per_s"] * crew.window_s
    spent = {**{part: closed[part] - opened[part] for part in PARTS}, "client": found["client"]["client_cpu_s"]}
    told = {name: found.get(name) for name in ("rps", "p50_ms", "p99_ms", "tokens_per_s", "tokens_a_piece")}
    return {
        **told,
        "failed": found["requests"] - found["statuses"].get("200", 0),
        "cpu_us": {part: round(1e6 * seconds / count, 1) for part, seconds in spent.items()},
    }


def table(results: Sequence[Mapping[str, Any]], kind: str, unit: str) -> Table:
    made = Table(title=f"{kind}: processor microseconds for each {unit}", title_justify="left")
    rows = [result for result in results if result["kind"] == kind]
    heads = {"at_a_time": "at a time", "rps": "requests/s", "tokens_per_s": "tokens/s", "tokens_a_piece": "a piece"}
    heads |= {"p50_ms": "p50 ms", "p99_ms": "p99 ms", "failed": "failed"}
    shown = {key: head for key, head in heads.items() if any(row[key] is not None for row in rows)}
    engines = ["engine alone"] if kind == TEXT else []
    for head in (*shown.values(), *PARTS, "service", "client", *engines):
        made.add_column(head, justify="right")
    for row in rows:
        cpu = row["cpu_us"]
        parts = [cpu[part] for part in PARTS]
        made.add_row(
            *(str(row[key]) for key in shown),
            *(f"{x:g}" for x in parts),
            f"{sum(parts):.0f}",
            str(cpu["client"]),
            *(str(row["engine_us"]) for _ in engines),
        )
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_path", description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=numbers, default="1,8,64,512", help="for rows; empty for none")
    parser.add_argument("--streams", type=numbers, default="1,8,32", help="for text; empty for none")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the engine, for one token of every stream")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
