"""From `fettle serve` to the first answer, and from a request for a sleeping variant to its first batch, by phases.

    python -m benchmarks.startup FAMILY [--variant onnx-int8] [--starts 5] [--wake onnx-int8]

Starts the service several times as a user does and asks it until it answers. Where a phase ends is read afterwards:
when processes began from the system, when engines were loaded and warm from what replicas write into their logs. Times
count from when the process of `fettle serve` began. `--wake` then starts it with this variant alone and no replica, and
one request brings it up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import REPLICA, Server, ServerSpec, title_of
from deployments.fastpath import free_port
from fettle.family import Family
from fettle.manifest import TaskKind

LOG = Path("build/benchmark-logs/startup.log")
SESSIONS = Path(tempfile.gettempdir()) / "ray"
LOOK_EVERY_S = 0.02
SERVING = "serving at"
GCS = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
# Which processes' beginnings end a phase.
BEGINS = {"imports": str(GCS), "ray": "ray::ServeController", "controller": REPLICA}
# In order; each ends when, or as soon as all of, these are there.
PHASES = {
    "imports": "interpreter and imports, until Ray is started",
    "ray": "Ray's processes, until it starts the first worker",
    "controller": "Serve's controller, until the first replica's process",
    "processes": "until the last replica's process begins to load",
    "loaded": "until the last engine is loaded",
    "warm": "until the last engine is warm",
    "answer": "until the first answer",
    "ready": "until `fettle serve` says so",
}


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    family = Family.open(options.family)
    starts = [one_start(family, options) for _ in range(options.starts)]
    found: dict[str, Any] = {"starts": starts, "median": medians(starts)}
    if not options.json:
        print_table(found["median"], starts)
    if options.wake:
        woken = [one_wake(family, options) for _ in range(options.starts)]
        found |= {"wakes": woken, "wake_median": medians(woken)}
        if not options.json:
            print_table(found["wake_median"], woken)
    print(json.dumps({"benchmark": "startup", "family": family.name, "hardware": machine, **found}))


def one_start(family: Family, options: argparse.Namespace) -> dict[str, float]:
    """Seconds from the beginning until each phase's end, the processor seconds until then, and those of stopping."""
    with tempfile.TemporaryDirectory() as scratch:
        spec = command(family, scratch, [f"--variant={name}" for name in options.variant], *options.variant[:1])
        with Server(replace(spec, look_every_s=LOOK_EVERY_S), LOG) as server:
            answered = time.time()
            said = until(lambda: SERVING in LOG.read_text(errors="replace"))
            began = server.first.create_time()
            phases = {"answer": answered - began, "ready": said - began, **started(server)}
            phases = {name: phases[name] for name in PHASES if name in phases}
            phases["cpu_s"] = server.cpu_seconds()
            stopping = time.time()
    return {**phases, "stop": time.time() - stopping}


def one_wake(family: Family, options: argparse.Namespace) -> dict[str, float]:
    """Seconds from a request to a variant without replicas until each phase's end."""
    with tempfile.TemporaryDirectory() as scratch:
        spec = command(family, scratch, [f"--variant={options.wake}", "--min-replicas=0"], options.wake)
        up = replace(spec, url=spec.url.rpartition("/")[0] + "/health", probe=None, look_every_s=LOOK_EVERY_S)
        with Server(up, LOG) as server:
            until(lambda: SERVING in LOG.read_text(errors="replace"))
            time.sleep(options.settle)
            asked = time.time()
            request = urllib.request.Request(spec.url, spec.probe, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                reply.read()
            answered = time.time()
            [replica] = [each for each in server.processes(REPLICA) if f".{options.wake}@" in title_of(each)]
            [line] = engine_lines(server)
    warm = line["at"]
    return {
        "decided": replica.create_time() - asked,
        "processes": warm - (line["load_ms"] + line["warm_up_ms"]) / 1000 - asked,
        "loaded": warm - line["warm_up_ms"] / 1000 - asked,
        "warm": warm - asked,
        "answer": answered - asked,
    }


def command(family: Family, scratch: str, more: Sequence[str], variant: str | None = None) -> ServerSpec:
    """`fettle serve`, and a request for the variant, or the family's default class."""
    path, body = {
        TaskKind.CLASSIFY: ("/classify", {"input": "Are you there?"}),
        TaskKind.EMBED: ("/v1/embeddings", {"input": "Are you there?"}),
    }[family.manifest.task.kind]
    port = free_port()
    where = [f"--port={port}", f"--evidence={scratch}"]
    return ServerSpec(
        [sys.executable, "-m", "fettle.cli", "serve", family.directory.resolve().as_posix(), *more, *where],
        f"http://127.0.0.1:{port}{path}",
        json.dumps({"model": f"{family.name}:{variant}" if variant else family.name, **body}).encode(),
        # As where it is installed, modules are compiled once.
        {"PYTHONDONTWRITEBYTECODE": ""},
    )


def started(server: Server) -> dict[str, float]:
    """When the phases ended that end before a request can be answered."""
    began = server.first.create_time()
    first = {name: min(each.create_time() for each in server.processes(begin)) for name, begin in BEGINS.items()}
    engines = engine_lines(server)
    lasts = {
        "processes": max((line["at"] - (line["load_ms"] + line["warm_up_ms"]) / 1000 for line in engines), default=0.0),
        "loaded": max((line["at"] - line["warm_up_ms"] / 1000 for line in engines), default=0.0),
        "warm": max((line["at"] for line in engines), default=0.0),
    }
    first |= {name: at for name, at in lasts.items() if at}
    return {name: at - began for name, at in first.items()}


def engine_lines(server: Server) -> list[dict[str, float]]:
    """What the replicas wrote when their engines were warm: `at`, `load_ms`, `warm_up_ms`."""
    [session] = SESSIONS.glob(f"session_*_{server.first.pid}")
    return list(_engine_lines(session / "logs" / "serve"))


def _engine_lines(logs: Path) -> Iterator[dict[str, float]]:
    for file in logs.glob("replica_*"):
        for line in file.read_text(errors="replace").splitlines():
            if '"engine"' in line:
                said = json.loads(line)
                at = datetime.fromisoformat(said["asctime"]).timestamp()
                yield {"at": at, "load_ms": said["load_ms"], "warm_up_ms": said["warm_up_ms"]}


def until(condition: Callable[[], bool], most_s: float = 120.0) -> float:
    """When it came true. Raises TimeoutError if it does not."""
    deadline = time.time() + most_s
    while time.time() < deadline:
        if condition():
            return time.time()
        time.sleep(LOOK_EVERY_S)
    raise TimeoutError(f"not within {most_s:g} s; see {LOG}")


def medians(starts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(start[name] for start in starts) for name in starts[0]}


def print_table(median: Mapping[str, float], starts: Sequence[Mapping[str, float]]) -> None:
    made = Table("phase", "", "ends at, s", "least", "most")
    for name, value in median.items():
        each = [start[name] for start in starts]
        made.add_row(name, PHASES.get(name, ""), f"{value:.2f}", f"{min(each):.2f}", f"{max(each):.2f}")
    Console(width=120).print(made)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("family", type=Path)
    parser.add_argument("--variant", action="append", default=[], help="serve this one; may be repeated")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--wake", help="a variant that is started by a request for it")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds before that request")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
