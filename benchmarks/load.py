"""A load client in a process of its own: what a server answers, how fast, and at what cost to the client.

Closed loop (`--connections`), for throughput and latency at a given concurrency; or open loop (`--rate`), for
overload, with latency from the time a request was due, so that a stalled server cannot hide its stalls by slowing
the client down. A stream may hold several flows: quality classes, keys, deadlines, each with its own part of the
requests or its own rate over time. Replies are not decoded while the clock runs, except a sample afterwards. It starts
no server and measures no server's CPU.

    python -m benchmarks.load --url http://127.0.0.1:8000/v1/embeddings --model minilm --connections 8
    python -m benchmarks.load --url http://127.0.0.1:8000/classify --kind classify --model sections --rate 300
        --flow '{"tag": "exact", "share": 1, "max_disagreement": "exact"}' --flow '{"tag": "1 %", "share": 4}'
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arrivals import Arrivals, merged, scaled, steady
from benchmarks.pool import ClosedLoop, OpenLoop
from benchmarks.samples import Recorder, Samples, quantiles, summarize
from benchmarks.traffic import KINDS, Flow, Kind, Request, encode_flows, read_answer, read_texts, shuffled

TEXTS = Path("examples/data/debian-sections.test.jsonl.gz")


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to send and for how long. `rate` (requests a second) or profiles of the flows make it an open loop.

    `once`: a closed loop that sends every text (the `first` of them) once in each flow and ends; `requests`: one that
    ends after so many. Their window is all that they send. `keep` names reply headers that go into the samples, which
    are written to `samples`; `labels` has the answers' labels read too. A sample's `text` is a place in
    `shuffled(read_texts(texts), seed)`.
    """

    url: str
    model: str
    texts: Path = TEXTS
    kind: Kind = "openai"
    flows: tuple[Flow, ...] = (Flow(),)
    connections: int = 1
    rate: float | None = None
    arrivals: Arrivals = "poisson"
    seconds: float = 10.0
    warm_up: float = 2.0
    drain: float = 30.0
    seed: int = 0
    check: int = 4
    headers: tuple[str, ...] = ()
    once: bool = False
    requests: int | None = None
    first: int | None = None
    keep: tuple[str, ...] = ()
    labels: bool = False
    samples: Path | None = None

    @classmethod
    def from_json(cls, text: str) -> LoadPlan:
        fields = json.loads(text)
        flows = tuple(_flow(flow) for flow in fields["flows"])
        samples = None if fields["samples"] is None else Path(fields["samples"])
        plain = {name: tuple(fields[name]) for name in ("headers", "keep")}
        return cls(**fields | plain | {"texts": Path(fields["texts"]), "flows": flows, "samples": samples})

    @property
    def ends(self) -> bool:
        """Whether it comes to an end by itself."""
        return self.once or self.requests is not None

    @property
    def is_open(self) -> bool:
        return self.rate is not None or any(flow.profile for flow in self.flows)


def ignore(_: str) -> None:
    """Hear of a window and do nothing."""


async def run(plan: LoadPlan, on_window: Callable[[str], None] = ignore) -> dict[str, Any]:
    """Run the plan in this process; `on_window` hears "open" and "closed" as the measured window begins and ends."""
    texts = shuffled(read_texts(plan.texts), plan.seed)[: plan.first]
    requests = encode_flows(plan.url, plan.kind, plan.model, texts, plan.flows, plan.headers)
    recorder = Recorder(plan.check, plan.keep, labels=plan.labels)
    loop = _loop(plan, requests, recorder)
    gc.disable()  # a collection over many samples would be charged to the server's p99
    started = time.perf_counter()
    epoch = time.time()
    loop.start()
    await asyncio.sleep(0 if plan.ends else plan.warm_up)
    on_window("open")
    opened, cpu = time.perf_counter(), time.process_time()
    if plan.ends and isinstance(loop, ClosedLoop):
        await loop.done.wait()
    else:
        await asyncio.sleep(plan.seconds)
    closed, cpu = time.perf_counter(), time.process_time() - cpu
    on_window("closed")
    if isinstance(loop, OpenLoop):
        await loop.drain(plan.drain)
    else:
        loop.stop()
    seen = recorder.samples([flow.tag for flow in plan.flows], opened, epoch + opened - started)
    window = closed - opened
    counted = seen.due if isinstance(loop, OpenLoop) else seen.ended
    # What the first connection sent before such a window was open belongs to it too.
    inside = seen.where((counted >= (-1.0 if plan.ends else 0.0)) & (counted < window))
    if plan.samples is not None:
        inside.save(plan.samples)
    report = summarize(inside, window) | {"client_cpu_s": round(cpu, 3)}
    if len(plan.flows) > 1:
        report["flows"] = {flow.tag: summarize(inside.where(inside.of(flow.tag)), window) for flow in plan.flows}
    if isinstance(loop, OpenLoop):
        report["send_lag_p99_ms"] = quantiles(1000 * np.array(loop.lags, np.float64))["p99_ms"]
    return report | {"checked": _check(plan.kind, recorder.bodies)}


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


def sampled(plan: LoadPlan, on_window: Callable[[str], None] = ignore) -> tuple[dict[str, Any], Samples]:
    """`run_apart`, and what the plan's file of samples then holds.

    Raises:
        RuntimeError: the client failed.
        ValueError: the plan names no file.
    """
    if plan.samples is None:
        raise ValueError("samples: the plan must name a file for them")
    return run_apart(plan, on_window), Samples.load(plan.samples)


def schedule(plan: LoadPlan, texts: int) -> Iterator[tuple[float, int, int]]:
    """An open loop's requests in order: second after the start, number of the flow, number of the text."""
    total = sum(flow.share for flow in plan.flows if not flow.profile)
    profiles = [flow.profile or scaled(steady(plan.rate or 0.0), flow.share / total) for flow in plan.flows]
    for number, (at, flow) in enumerate(merged(profiles, plan.arrivals, plan.seed)):
        yield at, flow, number % texts


def _loop(plan: LoadPlan, requests: list[list[Request]], recorder: Recorder) -> ClosedLoop | OpenLoop:
    texts = len(requests[0])
    if plan.is_open:
        due = ((at, requests[flow][text]) for at, flow, text in schedule(plan, texts))
        return OpenLoop(plan.url, due, most_connections=1024, recorder=recorder)
    if plan.once:
        each = iter([request for text in zip(*requests, strict=True) for request in text])
        return ClosedLoop(plan.url, each, plan.connections, recorder)
    return ClosedLoop(plan.url, itertools.islice(_mixed(plan, requests), plan.requests), plan.connections, recorder)


def _mixed(plan: LoadPlan, requests: list[list[Request]]) -> Iterator[Request]:
    """The texts in turn, for ever, each in a flow that is drawn by the shares."""
    source = random.Random(plan.seed)
    shares = [flow.share for flow in plan.flows]
    for text in itertools.cycle(range(len(requests[0]))):
        flow = source.choices(range(len(shares)), shares)[0] if len(shares) > 1 else 0
        yield requests[flow][text]


def _check(kind: Kind, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Decode the kept replies: how many, and what was wrong with the bad ones."""
    problems = []
    for body in bodies:
        try:
            read_answer(kind, body)
        except ValueError as error:
            problems.append(str(error))
    return {"replies": len(bodies), "problems": problems}


def _flow(fields: dict[str, Any]) -> Flow:
    return Flow(**fields | {"profile": tuple((at, rate) for at, rate in fields.get("profile", ()))})


def _parse(arguments: Sequence[str]) -> LoadPlan:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", required=True, help="with the path, e.g. http://127.0.0.1:8000/v1/embeddings")
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, default=TEXTS, help="JSONL with a field `text`, may be gzipped")
    parser.add_argument("--kind", choices=KINDS, default="openai", help="shape of the request")
    parser.add_argument("--flow", action="append", help="JSON with some of tag, share, profile, max_disagreement, ...")
    parser.add_argument("--connections", type=int, default=1, help="closed loop: clients")
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--arrivals", choices=("constant", "poisson"), default="poisson")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured window")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before the window opens")
    parser.add_argument("--drain", type=float, default=30.0, help="open loop: seconds to wait for late replies")
    parser.add_argument("--seed", type=int, default=0, help="order of the texts, and of Poisson arrivals")
    parser.add_argument("--check", type=int, default=4, help="replies to decode and check after the run")
    parser.add_argument("--header", action="append", default=[], help="`Name: value`; may be repeated")
    parser.add_argument("--samples", type=Path, help="write every request to this file (.npz)")
    parser.add_argument("--keep", action="append", default=[], help="a reply header to keep in the samples")
    options = vars(parser.parse_args(arguments))
    given = options.pop("flow")
    flows = tuple(_flow(json.loads(text)) for text in given) if given else (Flow(),)
    headers, keep = tuple(options.pop("header")), tuple(options.pop("keep"))
    return LoadPlan(flows=flows, headers=headers, keep=keep, **options)


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    told = sys.argv[1:2] == ["--plan"]  # by run_apart: the plan as JSON, and it wants to hear of the window
    plan = LoadPlan.from_json(sys.argv[2]) if told else _parse(sys.argv[1:])
    work = run(plan, (lambda event: _say({"window": event})) if told else ignore)
    try:
        import uvloop
    except ImportError:
        _say(asyncio.run(work))
    else:
        _say(uvloop.run(work))


if __name__ == "__main__":
    main()
