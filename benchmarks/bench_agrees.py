"""`fettle bench` beside wrk on the same server: rates and percentiles must agree.

    python -m benchmarks.bench_agrees [--family DIR] [--seconds 6] [--rounds 3]

First on a server that is fast and constant (`benchmarks.constant_server`), then on `fettle serve` with a fake engine
that takes a constant time. Both clients keep the same number of connections under way, turn about, several times; the
figures are medians over the rounds. wrk is Debian's package `wrk`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import Server, ServerSpec
from deployments.fastpath import free_port
from fettle.bench.crew import measure
from fettle.bench.figures import figures
from fettle.bench.load import LoadPlan
from tests.fakes import FakeVariant, make_fake_family

LOG = Path("build/benchmark-logs/bench-agrees.log")
RANKS = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
AGREE = 0.03
TEXT = "the quick brown fox"
# wrk prints latencies with three digits; of what is this small, the last one is more than 3 %.
SCRIPT = """
wrk.method = "POST"
wrk.body = '{body}'
wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency, requests)
  io.write(string.format('{{"requests": %d, "us": %d, "errors": %d', summary.requests, summary.duration,
    summary.errors.status + summary.errors.read + summary.errors.connect + summary.errors.timeout))
  for _, p in pairs({{50, 90, 99}}) do io.write(string.format(', "p%d_ms": %.4f', p, latency:percentile(p) / 1000)) end
  io.write(string.format(', "mean_ms": %.4f}}\\n', latency.mean / 1000))
end
"""


def main() -> None:
    options = parse(sys.argv[1:])
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed; `apt-get install wrk`")
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.servers:
            spec = SERVERS[name](Path(scratch))
            with Server(spec, LOG):
                for connections in options.connections:
                    say(f"{name}, {connections} connections")
                    rows.append(compared(name, spec.url, connections, options))
    if not options.json:
        print_table(rows)
    apart = [row for row in rows if max(abs(ratio - 1) for ratio in row["ratio"].values()) > AGREE]
    print(json.dumps({"benchmark": "bench_agrees", "hardware": machine, "rows": rows, "apart": len(apart)}))
    sys.exit(1 if apart else 0)


def constant(_: Path) -> ServerSpec:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.constant_server", str(port), "--ms", "5"]
    return ServerSpec(command, f"http://127.0.0.1:{port}/classify", body())


def fettle(scratch: Path) -> ServerSpec:
    """One variant that takes 5 ms a batch, on two replicas."""
    make_fake_family(scratch / "fake", variants=[FakeVariant("fake", ms_per_call=5.0)])
    return service.spec(service.config(scratch / "fake", 2, scratch, share=0.0), free_port(), "/classify", "fake")


SERVERS: dict[str, Callable[[Path], ServerSpec]] = {"constant": constant, "fettle serve": fettle}


def body() -> bytes:
    return json.dumps({"model": "fake", "input": TEXT}).encode()


def compared(name: str, url: str, connections: int, options: argparse.Namespace) -> dict[str, Any]:
    """Turn about, so that what the machine does in between meets both."""
    clients: dict[str, Callable[[], dict[str, float]]] = {
        "wrk": lambda: by_wrk(url, connections, options.seconds),
        "fettle bench": lambda: by_bench(url, connections, options.seconds),
    }
    found: dict[str, list[dict[str, float]]] = {client: [] for client in clients}
    for number in range(options.rounds):
        for client in list(clients)[:: 1 if number % 2 == 0 else -1]:
            found[client].append(clients[client]())
    names = ("rps", "mean_ms", *RANKS)
    middle = {
        client: {key: statistics.median(each[key] for each in rounds) for key in names}
        for client, rounds in found.items()
    }
    ratio = {key: middle["fettle bench"][key] / middle["wrk"][key] for key in names}
    return {"server": name, "connections": connections, **middle, "ratio": ratio, "rounds": found}


def by_wrk(url: str, connections: int, seconds: float) -> dict[str, float]:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT.format(body=body().decode()))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", script.name, url]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = re.search(r"^\{.*\}$", said, re.M)
    if line is None:
        raise RuntimeError(f"wrk said something else:\n{said}")
    read: dict[str, float] = json.loads(line[0])
    if read["errors"]:
        raise RuntimeError(f"wrk met {read['errors']:g} errors")
    return {**read, "rps": read["requests"] / read["us"] * 1e6}


def by_bench(url: str, connections: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch, "texts.txt")
        texts.write_text(TEXT)
        plan = LoadPlan(
            url, "fake", texts=texts, kind="classify", connections=connections, seconds=seconds, warm_up=0.5
        )
        report = figures(measure(plan))
    if set(report["statuses"]) != {"200"}:
        raise RuntimeError(f"fettle bench met {report['statuses']}")
    names = ("rps", "mean_ms", *RANKS)
    return {name: float(report[name]) for name in names} | {"client": report["client"]["busiest_client"]}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    made = Table("server", "connections", "client", "requests/s", "mean ms", "p50", "p90", "p99")
    for row in rows:
        for client in ("wrk", "fettle bench"):
            figures_ = [f"{row[client][key]:.2f}" for key in ("rps", "mean_ms", *RANKS)]
            made.add_row(row["server"], str(row["connections"]), client, *figures_)
        made.add_row("", "", "ratio", *(f"{value:.3f}" for value in row["ratio"].values()))
    Console(width=120).print(made)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_agrees")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=lambda text: [int(part) for part in text.split(",")], default=[4, 16])
    parser.add_argument(
        "--servers", type=lambda text: text.split(","), default=list(SERVERS), help="of constant, fettle serve"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
