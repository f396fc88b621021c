"""What is compared takes turns: the bare int8 engine, the service with it and with a class, Infinity, round by round.

    python -m benchmarks.encoder_turns FAMILY --model MODEL --rounds 3

`benchmarks.encoder_serving` measures one system after the other, and a machine that others share is by then another
one: the same work did 319 and 256 requests a second within a minute. Here each round has all of them, so that a ratio
is of one pace, and what is reported are medians of the rounds' ratios. Closed loop, all cores, the client on the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.classify_serving import INT8
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.offline import offline_limit
from benchmarks.peers import infinity
from benchmarks.processes import Server
from benchmarks.systems import peer_system
from deployments.fastpath import free_port
from fettle.bench.crew import measure
from fettle.bench.load import TEXTS, LoadPlan
from fettle.bench.texts import read_texts, shuffled
from fettle.bench.traffic import Flow
from fettle.family import Family

LOG = Path("build/benchmark-logs/encoder-turns.log")
BARE, PINNED, CLASS = "bare int8 engine", "int8, pinned", "class 1 %"
LEVEL = 0.01
# What is held against what.
RATIOS = ((PINNED, BARE), (CLASS, "infinity-int8"), (CLASS, "infinity-torch"), (CLASS, "infinity-torch-bf16"))


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    rounds = [one_round(options, machine["cores"]) for _ in range(options.rounds)]
    ratios = {f"{over} / {under}": [turn[over] / turn[under] for turn in rounds] for over, under in held(options)}
    if not options.json:
        print_table(rounds, ratios)
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    print(json.dumps({"benchmark": "encoder_turns", "hardware": machine, "rounds": rounds, "ratios": medians}))


def held(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [(over, under) for over, under in RATIOS if under == BARE or under in options.peers]


def one_round(options: argparse.Namespace, cores: int) -> dict[str, float]:
    """Requests or rows a second of each."""
    family = Family.open(options.family)
    texts = shuffled(read_texts(options.texts), options.seed)[: options.offline_rows]
    found = {BARE: offline_limit(options.family, INT8, texts, cores).rows_per_second}
    load = partial(
        LoadPlan,
        texts=options.texts,
        connections=options.connections,
        seconds=options.seconds,
        warm_up=options.warm_up,
        check=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        spec = service.spec(service.config(options.family, cores, Path(scratch)), free_port(), "/classify", family.name)
        with Server(spec, LOG):
            found[PINNED] = rate(load(spec.url, f"{family.name}:{INT8}", kind="classify"))
            found[CLASS] = rate(load(spec.url, family.name, kind="classify", flows=(Flow(max_disagreement=LEVEL),)))
    for name in options.peers:
        system = peer_system(name, options.model, options.peer_env, "classify")
        spec = system.server(free_port())
        with Server(spec, LOG):
            found[name] = rate(load(spec.url, system.model, kind="classify-list"))
    print(json.dumps({name: round(value, 1) for name, value in found.items()}), file=sys.stderr, flush=True)
    return found


def rate(plan: LoadPlan) -> float:
    """Good replies a second."""
    found = measure(plan)
    return float(found.inside.good.sum()) / found.window_s


def print_table(rounds: Sequence[dict[str, float]], ratios: dict[str, list[float]]) -> None:
    table = Table("a second", *(f"round {number}" for number in range(1, len(rounds) + 1)), "median")
    for name in rounds[0]:
        each = [turn[name] for turn in rounds]
        table.add_row(name, *(f"{value:.1f}" for value in each), f"{statistics.median(each):.1f}")
    for name, found in ratios.items():
        table.add_row(name, *(f"{value:.2f}" for value in found), f"{statistics.median(found):.2f}")
    Console(width=120).print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_turns", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("family", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the family's model, for the peers")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="JSONL with a field `text`, may be gzipped")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["infinity-int8", "infinity-torch"])
    parser.add_argument("--peer-env", type=Path, default=infinity.PEER_ENV, help="Infinity's environment")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of every measured window")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before every window")
    parser.add_argument("--offline-rows", type=int, default=1024, help="texts that the bare engine runs over")
    parser.add_argument("--seed", type=int, default=0, help="the order of the texts")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
