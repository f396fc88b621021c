"""One client process of a load: what is sent when, for how long, and what one process makes of its part.

Closed loop (`connections`), for throughput and latency at a given concurrency; or open loop (`rate`, profiles of
flows, or a trace), with latency from the time a request was due, so that a stalled server cannot hide its stalls by
slowing the client down. A stream may hold several flows: quality classes, keys, deadlines, each with its own part of
the requests or its own rate over time. Replies are not decoded while the clock runs, except a sample afterwards.

    python -m fettle.bench.load PLAN_JSON    # by `fettle.bench.crew`: starts, ticks and stops over its pipes
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from fettle.bench.arrivals import Arrivals, merged, scaled, steady
from fettle.bench.pool import ClosedLoop, OpenLoop
from fettle.bench.samples import Recorder, quantiles
from fettle.bench.texts import Recorded, read_texts, read_trace, shuffled, synthetic_texts
from fettle.bench.traffic import GENERATES, Flow, Kind, Request, encode_flows, read_answer
from fettle.errors import UsageError

TEXTS = Path("examples/data/debian-sections.test.jsonl.gz")
MOST_CONNECTIONS = 1024
PROBE_S = 0.01
TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to send and for how long. `rate` (requests a second), profiles of the flows, or a `trace` make it open loop.

    `synthetic`: words of made texts, from and to, instead of `texts`. `once`: a closed loop that sends every text (the
    `first` of them) once in each flow and ends; `requests`: one that ends after so many. Their window is all that they
    send. `keep` names reply headers that go into the samples, which are written to `samples`; `labels` has the answers'
    labels read too. A sample's `text` is a place in `shuffled(read_texts(texts), seed)`, or in the trace. `max_tokens`:
    of generated texts, from and to; `body` is what all requests say beside. `part`: of so many clients that share it.
    """

    url: str
    model: str | None
    texts: Path = TEXTS
    synthetic: tuple[int, int] | None = None
    kind: Kind = "openai"
    flows: tuple[Flow, ...] = (Flow(),)
    connections: int = 1
    rate: float | None = None
    arrivals: Arrivals = "poisson"
    trace: Path | None = None
    speed: float = 1.0
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
    max_tokens: tuple[int, int] | None = None
    body: dict[str, Any] = field(default_factory=dict)
    part: tuple[int, int] = (0, 1)

    @classmethod
    def from_json(cls, text: str) -> LoadPlan:
        fields = json.loads(text)
        paths = {name: None if fields[name] is None else Path(fields[name]) for name in ("texts", "samples", "trace")}
        pairs = {name: None if fields[name] is None else tuple(fields[name]) for name in PAIRS}
        plain = {name: tuple(fields[name]) for name in ("headers", "keep")}
        flows = tuple(
            Flow(**flow | {"profile": tuple((at, rate) for at, rate in flow.get("profile", ()))})
            for flow in fields["flows"]
        )
        return cls(**fields | paths | pairs | plain | {"flows": flows})

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @property
    def ends(self) -> bool:
        """Whether a closed loop comes to an end by itself."""
        return self.once or self.requests is not None

    @property
    def is_open(self) -> bool:
        return self.rate is not None or self.trace is not None or any(flow.profile for flow in self.flows)

    @property
    def generates(self) -> bool:
        return self.kind in GENERATES


PAIRS = ("synthetic", "max_tokens", "part")


class Client:
    """A part of a load, in this process: built first, so that all clients of a load can start at one time."""

    def __init__(self, plan: LoadPlan) -> None:
        """Raises UsageError if the texts or the trace cannot be read."""
        self.plan = plan
        self.recorder = Recorder(plan.check, plan.keep, labels=plan.labels)
        self._loop = _loop(plan, self.recorder)
        self._stop = asyncio.Event()
        self._lags: list[float] = []
        self._cpu = time.process_time()

    def stop(self) -> None:
        """Close the window now."""
        self._stop.set()

    async def run(self, at: float, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Send from `at` on, a time of `perf_counter`; `tell` hears of the window and, every second, how it goes."""
        plan, loop = self.plan, self._loop
        epoch = time.time() + at - time.perf_counter()
        gc.disable()  # a collection over many samples would be charged to the server's p99
        loop.start(at)
        watching = [asyncio.create_task(self._probe()), asyncio.create_task(self._tick(at, tell))]
        opened = at + (0.0 if plan.ends else plan.warm_up)
        await self._until(opened)
        tell({"window": "open"})
        cpu, probed, left = time.process_time(), len(self._lags), 0
        if isinstance(loop, OpenLoop):
            left = len(loop.lags)
        # A trace ends with its last request, which may be sent a moment late.
        await self._until(None if plan.ends or plan.trace is not None else opened + plan.seconds)
        closed, cpu = time.perf_counter(), time.process_time() - cpu
        tell({"window": "closed"})
        for task in watching:
            task.cancel()
        lags = loop.lags[left:] if isinstance(loop, OpenLoop) else []
        await loop.drain(0.5 if self._stop.is_set() else plan.drain)
        seen = self.recorder.samples([flow.tag for flow in plan.flows], opened, epoch + opened - at)
        if plan.samples is not None:
            seen.save(plan.samples)
        return {
            "window_s": closed - opened,
            "client_cpu_s": cpu,
            "send_lag_p99_ms": _p99(lags),
            "loop_lag_p99_ms": _p99(self._lags[probed:]),
            "out_of_connections": loop.full if isinstance(loop, OpenLoop) else 0,
            "connections_failed": dict(loop.pool.failed),
            "refusal": self.recorder.refusal,
            "checked": _check(plan.kind, self.recorder.bodies),
        }

    async def _until(self, moment: float | None) -> None:
        """Until then, or until the load has come to its end or is stopped."""
        ends = self.plan.ends or self.plan.trace is not None
        waits = [asyncio.create_task(self._stop.wait())]
        if ends:
            waits.append(asyncio.create_task(self._loop.done.wait()))
        limit = None if moment is None else max(0.0, moment - time.perf_counter())
        await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _probe(self) -> None:
        """How late this process comes to what it means to do."""
        while True:
            due = time.perf_counter() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self._lags.append(time.perf_counter() - due)

    async def _tick(self, at: float, tell: Callable[[dict[str, Any]], None]) -> None:
        for second in itertools.count(1):
            await asyncio.sleep(max(0.0, at + second * TICK_S - time.perf_counter()))
            good, other, ms = self.recorder.news()
            cpu, self._cpu = self._cpu, time.process_time()
            tell(
                {
                    "tick": second,
                    "good": good,
                    "other": other,
                    "flying": self._loop.flying + self._loop.waiting,
                    "cpu": round(self._cpu - cpu, 3),
                    "ms": sorted(ms)[:: max(1, len(ms) // 200)],
                }
            )


def schedule(plan: LoadPlan, texts: int) -> Iterator[tuple[float, int, int]]:
    """An open loop's requests in order: second after the start, number of the flow, number of the text."""
    total = sum(flow.share for flow in plan.flows if not flow.profile)
    profiles = [flow.profile or scaled(steady(plan.rate or 0.0), flow.share / total) for flow in plan.flows]
    for number, (at, flow) in enumerate(merged(profiles, plan.arrivals, plan.seed)):
        yield at, flow, number % texts


def _loop(plan: LoadPlan, recorder: Recorder) -> ClosedLoop | OpenLoop:
    mine, clients = plan.part
    if plan.trace is not None:
        recorded = itertools.islice(_recorded(plan), mine, None, clients)
        return OpenLoop(plan.url, recorded, MOST_CONNECTIONS, recorder, streams=plan.generates)
    texts = _texts(plan)
    requests = encode_flows(plan.url, plan.kind, plan.model, texts, plan.flows, plan.headers, _bodies(plan, len(texts)))
    if plan.is_open:
        # The same times whatever the number of clients: each takes every so manyth request.
        taken = itertools.islice(schedule(plan, len(texts)), mine, None, clients)
        due = ((at, requests[flow][text]) for at, flow, text in taken)
        return OpenLoop(plan.url, due, MOST_CONNECTIONS, recorder, streams=plan.generates)
    connections = len(range(mine, plan.connections, clients))
    if plan.once:
        each = [request for text in zip(*requests, strict=True) for request in text]
        return ClosedLoop(plan.url, iter(each[mine::clients]), connections, recorder, streams=plan.generates)
    count = None if plan.requests is None else len(range(mine, plan.requests, clients))
    return ClosedLoop(
        plan.url, itertools.islice(_mixed(plan, requests), count), connections, recorder, streams=plan.generates
    )


def _texts(plan: LoadPlan) -> list[str]:
    if plan.synthetic is not None:
        return synthetic_texts(plan.synthetic, plan.seed)[: plan.first]
    return shuffled(read_texts(plan.texts), plan.seed)[: plan.first]


def _bodies(plan: LoadPlan, texts: int) -> list[dict[str, Any]]:
    """What each text's request says beside its text."""
    if plan.max_tokens is None:
        return [plan.body] * texts
    source = random.Random(f"{plan.seed} lengths")
    return [{"max_tokens": source.randint(*plan.max_tokens), **plan.body} for _ in range(texts)]


def _recorded(plan: LoadPlan) -> Iterator[tuple[float, Request]]:
    """The trace's requests; those that have no text are given the plan's texts in turn."""
    assert plan.trace is not None
    rows = read_trace(plan.trace, plan.speed)
    spare = itertools.cycle(_texts(plan)) if any(row.text is None for row in rows) else iter(())
    bodies = _bodies(plan, len(rows))
    flows, drawn = list(plan.flows), random.Random(plan.seed)
    shares = [flow.share for flow in flows]
    made: list[tuple[float, Request]] = []
    for number, row in enumerate(rows):
        text = next(spare) if row.text is None else row.text
        flow = drawn.choices(range(len(flows)), shares)[0]
        body = dict(bodies[number])
        if row.max_tokens is not None:
            body["max_tokens"] = row.max_tokens
        [[request]] = encode_flows(
            plan.url, plan.kind, plan.model, [text], [_flow_of(row, flows[flow])], plan.headers, [body]
        )
        made.append((row.at, Request(request.data, flow, number)))
    return iter(made)


def _flow_of(row: Recorded, flow: Flow) -> Flow:
    """What the trace says of a request goes before what its flow says."""
    return flow if row.max_disagreement is None else Flow(flow.tag, max_disagreement=row.max_disagreement, key=flow.key)


def _mixed(plan: LoadPlan, requests: list[list[Request]]) -> Iterator[Request]:
    """The texts in turn, for ever, each in a flow that is drawn by the shares."""
    mine, clients = plan.part
    source = random.Random(plan.seed if not mine else f"{plan.seed} {mine}")
    shares = [flow.share for flow in plan.flows]
    texts = range(len(requests[0]))
    begin = mine * len(texts) // clients
    for text in itertools.cycle([*texts[begin:], *texts[:begin]]):
        flow = source.choices(range(len(shares)), shares)[0] if len(shares) > 1 else 0
        yield requests[flow][text]


def _check(kind: Kind, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Decode the kept replies: how many, and what was wrong with the bad ones. Streams were checked as they came."""
    problems = []
    for body in [] if kind in GENERATES else bodies:
        try:
            read_answer(kind, body)
        except ValueError as error:
            problems.append(str(error))
    return {"replies": len(bodies), "problems": problems}


def _p99(seconds: Sequence[float]) -> float | None:
    return quantiles(1000 * np.array(seconds, np.float64))["p99_ms"]


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def _serve_crew(plan: LoadPlan) -> None:
    """Say when ready, wait for the time to start on standard input, stop when told so or when the crew is gone."""
    client = Client(plan)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say({"ready": True})
    at = float(await reader.readline() or "nan")
    if at != at:
        return

    async def listen() -> None:
        await reader.readline()
        client.stop()

    listening = asyncio.create_task(listen())
    _say({"report": await client.run(at, _say)})
    listening.cancel()


def main() -> None:
    try:
        uvloop.run(_serve_crew(LoadPlan.from_json(sys.argv[1])))
    except UsageError as error:
        _say({"error": error.message})


if __name__ == "__main__":
    main()
