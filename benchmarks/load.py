"""A load client in a process of its own: what a server answers, how fast, and at what cost to the client.

Closed loop (`--connections`), for throughput and latency at a given concurrency; or open loop (`--rate`), for
overload, with latency from the time a request was due, so that a stalled server cannot hide its stalls by slowing
the client down. Replies are not decoded while the clock runs, except a sample afterwards. It starts no server and
measures no server's CPU.

    python -m benchmarks.load --url http://127.0.0.1:8000/v1/embeddings --model minilm --connections 8
    python -m benchmarks.load --url http://127.0.0.1:8000/v1/embeddings --model minilm --rate 300 --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.pool import LOST, ClosedLoop, OpenLoop, Recorder, Sample, constant_gaps, poisson_gaps
from benchmarks.traffic import KINDS, Kind, encode_all, read_answer, read_texts, shuffled

TEXTS = Path("examples/data/debian-sections.test.jsonl.gz")


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to send and for how long. `rate` (requests a second) makes it an open loop."""

    url: str
    model: str
    texts: Path = TEXTS
    kind: Kind = "openai"
    connections: int = 1
    rate: float | None = None
    arrivals: Literal["constant", "poisson"] = "poisson"
    seconds: float = 10.0
    warm_up: float = 2.0
    drain: float = 30.0
    seed: int = 0
    check: int = 4
    headers: tuple[str, ...] = ()


def ignore(_: str) -> None:
    """Hear of a window and do nothing."""


async def run(plan: LoadPlan, on_window: Callable[[str], None] = ignore) -> dict[str, Any]:
    """Run the plan in this process; `on_window` hears "open" and "closed" as the measured window begins and ends."""
    texts = shuffled(read_texts(plan.texts), plan.seed)
    requests = encode_all(plan.url, plan.kind, plan.model, texts, plan.headers)
    recorder = Recorder(plan.check)
    loop = _loop(plan, requests, recorder)
    gc.disable()  # a collection over many samples would be charged to the server's p99
    loop.start()
    await asyncio.sleep(plan.warm_up)
    on_window("open")
    opened, cpu = time.perf_counter(), time.process_time()
    await asyncio.sleep(plan.seconds)
    closed, cpu = time.perf_counter(), time.process_time() - cpu
    on_window("closed")
    if isinstance(loop, OpenLoop):
        await loop.drain(plan.drain)
        inside = [s for s in recorder.samples if opened <= s.started < closed]
    else:
        inside = [s for s in recorder.samples if opened <= s.ended < closed]
        loop.stop()
    report = summarize(inside, closed - opened) | {"client_cpu_s": round(cpu, 3)}
    if isinstance(loop, OpenLoop):
        report["send_lag_p99_ms"] = _quantiles(loop.lags)["p99_ms"]
    return report | {"checked": _check(plan.kind, recorder.bodies)}


def summarize(samples: Sequence[Sample], window_s: float) -> dict[str, Any]:
    """Counts by status, good replies a second, latency of the good and of the refused (429) ones in ms."""
    good = [s for s in samples if s.status == 200]
    refused = [s for s in samples if s.status == 429]
    statuses = Counter("lost" if s.status == LOST else str(s.status) for s in samples)
    report: dict[str, Any] = {
        "requests": len(samples),
        "statuses": dict(sorted(statuses.items())),
        "window_s": round(window_s, 3),
        "rps": round(len(good) / window_s, 2),
        **_quantiles([s.ended - s.started for s in good]),
    }
    if refused:
        latencies = _quantiles([s.ended - s.started for s in refused])
        report["refused"] = {"with_retry_after": sum(s.retry_after for s in refused), **latencies}
    return report


def run_apart(plan: LoadPlan, on_window: Callable[[str], None] = ignore) -> dict[str, Any]:
    """`run` in a process of its own.

    Raises:
        RuntimeError: the client failed.
    """
    command = [sys.executable, "-m", "benchmarks.load", "--plan", json.dumps(asdict(plan), default=str)]
    report: dict[str, Any] | None = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        for line in client.stdout or ():
            message = json.loads(line)
            if "window" in message:
                on_window(message["window"])
            else:
                report = message
    if report is None:
        raise RuntimeError(f"the load client failed with exit status {client.returncode}")
    return report


def _loop(plan: LoadPlan, requests: Sequence[bytes], recorder: Recorder) -> ClosedLoop | OpenLoop:
    if plan.rate is None:
        return ClosedLoop(plan.url, requests, plan.connections, recorder)
    gaps = poisson_gaps(plan.rate, plan.seed) if plan.arrivals == "poisson" else constant_gaps(plan.rate)
    return OpenLoop(plan.url, requests, gaps, most_connections=1024, recorder=recorder)


def _quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Nearest-rank quantiles in ms; None where there is nothing to rank."""
    ranked = sorted(seconds)
    ranks = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "max_ms": 1.0}
    if not ranked:
        return dict.fromkeys(ranks)
    return {name: round(1000 * ranked[max(0, math.ceil(q * len(ranked)) - 1)], 3) for name, q in ranks.items()}


def _check(kind: Kind, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Decode the kept replies: how many, and what was wrong with the bad ones."""
    problems = []
    for body in bodies:
        try:
            read_answer(kind, body)
        except ValueError as error:
            problems.append(str(error))
    return {"replies": len(bodies), "problems": problems}


def _parse(arguments: Sequence[str]) -> LoadPlan:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", required=True, help="with the path, e.g. http://127.0.0.1:8000/v1/embeddings")
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, default=TEXTS, help="JSONL with a field `text`, may be gzipped")
    parser.add_argument("--kind", choices=KINDS, default="openai", help="shape of the request")
    parser.add_argument("--connections", type=int, default=1, help="closed loop: clients")
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--arrivals", choices=("constant", "poisson"), default="poisson")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured window")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before the window opens")
    parser.add_argument("--drain", type=float, default=30.0, help="open loop: seconds to wait for late replies")
    parser.add_argument("--seed", type=int, default=0, help="order of the texts, and of Poisson arrivals")
    parser.add_argument("--check", type=int, default=4, help="replies to decode and check after the run")
    parser.add_argument("--header", action="append", default=[], help="`Name: value`; may be repeated")
    options = vars(parser.parse_args(arguments))
    return LoadPlan(headers=tuple(options.pop("header")), **options)


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    told = sys.argv[1:2] == ["--plan"]  # by run_apart: the plan as JSON, and it wants to hear of the window
    if told:
        fields = json.loads(sys.argv[2])
        plan = LoadPlan(**fields | {"texts": Path(fields["texts"]), "headers": tuple(fields["headers"])})
    else:
        plan = _parse(sys.argv[1:])
    work = run(plan, (lambda event: _say({"window": event})) if told else ignore)
    try:
        import uvloop
    except ImportError:
        _say(asyncio.run(work))
    else:
        _say(uvloop.run(work))


if __name__ == "__main__":
    main()
