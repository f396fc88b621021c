"""A service that is updated under load: what fails, how many replicas more it takes, how soon a bad version goes.

One service on Ray with fake engines, a classifier and a text generator; clients that never pause, some of them with
streams of several seconds, and some that pause for seconds on a connection that they keep. It is deployed anew with
other settings, then with another version of the classifier; then `fettle rollout` begins with versions that answer
wrongly, do not load, and are slow, and with a good one. Every request must be answered, every stream whole. The exit
status is 1 if one is not, or a version ends as it should not.

    python -m benchmarks.rollout
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import REPLICA
from fettle.config import FamilyConfig, ReplicaConfig, ServeConfig
from tests.fakes import FakeVariant, make_fake_family, make_point, make_step
from tests.integration.service import Service, command, service
from tests.texts import make_text_family

CLIENTS, STREAMS, TOKENS = 6, 2, 150
# Others keep a connection each and ask seldom: it may lie at a HAProxy that was replaced meanwhile.
PATIENT, PAUSE_S = 4, 4.0
REPLICAS = 2
PATIENCE_S = 120.0
LOOK_EVERY_S = 0.2
SETTLED_WITHIN_S = 240.0
# At the classifier's cheap variant, by version; the first one is served at first.
VERSIONS: dict[str, dict[str, Any]] = {
    "first": {},
    "second": {"ms_per_call": 2.1},
    "wrong": {"ms_per_call": 2.2, "corrupt_every": 10},
    "broken": {"ms_per_call": 2.3},
    "slow": {"ms_per_call": 80.0},
    "good": {"ms_per_call": 1.9},
}
ENDS = {"wrong": "wrong answers", "broken": "load failure", "slow": "latency", "good": ""}


@dataclass
class Traffic:
    """What the clients got. `failed`: whatever is not a whole answer."""

    answered: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    streams: int = 0
    most_replicas: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    requests: int
    streams: int
    failed: list[str]
    by_version: dict[str, int]
    p50_ms: float
    slowest_ms: float
    most_replicas: dict[str, int]
    verdict: str = ""
    details: dict[str, float] = field(default_factory=dict)


def main() -> None:
    machine = describe_machine()
    print("\n".join(machine_lines(machine)))
    with tempfile.TemporaryDirectory(prefix="rollout-") as scratch:
        phases = asyncio.run(run(Path(scratch)))
    for phase in phases:
        print(
            f"{phase.name:10} {phase.seconds:5.0f} s  {phase.requests:6} requests, {phase.streams:3} streams, "
            f"{len(phase.failed)} failed  p50 {phase.p50_ms:.0f} ms, slowest {phase.slowest_ms:.0f} ms  "
            f"replicas at most {phase.most_replicas}  {phase.verdict} {phase.details or ''}"
        )
    wrong = broken_promises(phases)
    found = [{**vars(phase), "failed": len(phase.failed)} for phase in phases]
    print(json.dumps({"benchmark": "rollout", "hardware": machine, "phases": found, "broken_promises": wrong}))
    sys.exit(1 if wrong else 0)


def broken_promises(phases: list[Phase]) -> list[str]:
    found = [f"{phase.name}: {failure}" for phase in phases for failure in phase.failed]
    for phase in phases:
        if phase.name in ENDS:
            status = "promoted" if phase.name == "good" else "rolled back"
            if not phase.verdict.startswith(f"{status}: {ENDS[phase.name]}"):
                found.append(f"{phase.name}: ended as {phase.verdict!r}")
            if not phase.by_version.get("sections"):
                found.append(f"{phase.name}: the old version answered nothing")
    return found


async def run(where: Path, names: tuple[str, ...] = ("wrong", "broken", "slow", "good")) -> list[Phase]:
    """The phases one after the other, on one service."""
    make_versions(where)
    with service(config(where, "first"), where / "log") as running:
        phases = [
            await phase(running, "settings", lambda: update(running, config(where, "first", prefetch=2, threads=2))),
            await phase(running, "version", lambda: update(running, config(where, "second", prefetch=2, threads=2))),
        ]
        phases += [await phase(running, name, lambda name=name: roll(running, where / name)) for name in names]
    return phases


def make_versions(where: Path) -> None:
    point = make_point("within-0.01", 0.01, make_step("int8"), cost=2.0)
    for name, changes in VERSIONS.items():
        fast = FakeVariant("int8", **{"ms_per_call": 2.0, "ms_per_token": 0.02, **changes})
        made = make_fake_family(
            where / name, name="sections", variants=[FakeVariant("fp32", ms_per_call=4), fast], points=[point]
        )
        if name == "broken":
            (made.variant_path("int8") / "weights.bin").write_bytes(b"not what the manifest says")
    make_text_family(where / "lm", variants=[FakeVariant("bf16", ms_per_call=30)])


def config(where: Path, version: str, **replicas: int) -> ServeConfig:
    return ServeConfig(
        families=[
            FamilyConfig(path=str(where / version), name="sections"),
            FamilyConfig(path=str(where / "lm"), variants=["bf16"]),
        ],
        replicas=ReplicaConfig(min_replicas=REPLICAS, max_replicas=REPLICAS, **replicas),
    )


def update(running: Service, config: ServeConfig) -> dict[str, Any]:
    """Deploy anew, from a process of its own, and wait until the routers are new ones."""
    before = {process.pid for process in running.replicas("RouterIngress")}
    code = (
        "import sys; from deployments.server import connected, redeploy; from deployments.versions import ask_monitor\n"
        "from fettle.config import ServeConfig\n"
        "with connected(sys.argv[1]):\n"
        # What the service gave itself when it started.
        "    secret = ask_monitor('fettle', 'served').proxy_secret_file\n"
        "    config = ServeConfig.model_validate_json(sys.argv[2])\n"
        "    redeploy(config.model_copy(update={'proxy_secret_file': secret}))"
    )
    subprocess.run([sys.executable, "-c", code, running.address, config.model_dump_json()], check=True)
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while time.monotonic() < deadline:
        routers = {process.pid for process in running.replicas("RouterIngress")}
        if routers and not routers & before:
            return {"verdict": "replaced"}
        time.sleep(LOOK_EVERY_S)
    return {"verdict": "not replaced"}


def roll(running: Service, new: Path) -> dict[str, Any]:
    """`fettle rollout start`, with steps short enough for a benchmark."""
    short = ["--share", "0.2", "--step", "0.5", "--hold", "5", "--requests", "50", "--shadow", "1"]
    where = ["--family", "sections", "--address", running.address, "--json"]
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "fettle.cli", "rollout", "start", str(new), *short, *where],
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"rollouts"')]
    if not answers:
        return {"verdict": f"no verdict: {done.stdout[-500:]} {done.stderr[-500:]}"}
    [view] = json.loads(answers[-1])["rollouts"]
    position = view["position"]
    new_side = [tally["new"] for tally in view["tallies"].values()]
    return {
        "verdict": f"{position['status']}: {position['reason']}",
        "details": {
            "decided_after_s": round(position["since"] - started, 1),
            "requests_at_new": sum(side["requests"] for side in new_side),
            "evidence": max(value for name, value in view["findings"].items() if name != "alarm_at"),
        },
    }


async def phase(running: Service, name: str, work: Callable[[], dict[str, Any]]) -> Phase:
    """The work, while clients ask."""
    started = time.monotonic()
    async with load_on(running) as traffic:
        result = await asyncio.to_thread(work)
    times = sorted(traffic.times)
    return Phase(
        name,
        time.monotonic() - started,
        sum(traffic.answered.values()) + len(traffic.failed),
        traffic.streams,
        traffic.failed,
        dict(traffic.answered),
        1000 * times[len(times) // 2],
        1000 * times[-1],
        dict(traffic.most_replicas),
        result["verdict"],
        result.get("details", {}),
    )


@asynccontextmanager
async def load_on(running: Service) -> AsyncIterator[Traffic]:
    traffic, stop = Traffic(), asyncio.Event()
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as http:
        tasks = [asyncio.create_task(_ask(http, traffic, stop, number)) for number in range(CLIENTS)]
        tasks += [asyncio.create_task(_ask_seldom(running, traffic, stop, CLIENTS + n)) for n in range(PATIENT)]
        tasks += [asyncio.create_task(_stream(http, traffic, stop)) for _ in range(STREAMS)]
        tasks.append(asyncio.create_task(_look(running, traffic, stop)))
        await asyncio.sleep(2)
        yield traffic
        await asyncio.sleep(3)
        stop.set()
        await asyncio.gather(*tasks)


async def _ask(
    http: httpx.AsyncClient, traffic: Traffic, stop: asyncio.Event, number: int, pause_s: float = 0.02
) -> None:
    count = 0
    while not stop.is_set():
        count += 1
        started = time.monotonic()
        try:
            body = {"model": "sections", "input": f"word{number} fox word{count % 200}"}
            response = await http.post("/classify", json=body)
            if response.status_code == 200:
                traffic.answered[response.json()["fettle"]["family"]] += 1
            else:
                traffic.failed.append(f"{response.status_code} {response.text[:200]}")
        except httpx.HTTPError as error:
            traffic.failed.append(repr(error))
        traffic.times.append(time.monotonic() - started)
        await asyncio.sleep(pause_s)


async def _ask_seldom(running: Service, traffic: Traffic, stop: asyncio.Event, number: int) -> None:
    """On a connection of its own."""
    kept = httpx.Limits(keepalive_expiry=10 * PAUSE_S)
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S, limits=kept) as http:
        await _ask(http, traffic, stop, number, PAUSE_S)


async def _stream(http: httpx.AsyncClient, traffic: Traffic, stop: asyncio.Event) -> None:
    body = {"model": "lm", "prompt": "on and on", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    while not stop.is_set():
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                lines = [line async for line in response.aiter_lines() if line]
        except httpx.HTTPError as error:
            traffic.failed.append(f"stream: {error!r}")
            continue
        traffic.streams += 1
        if response.status_code != 200 or lines[-1] != "data: [DONE]" or "error" in lines[-2]:
            traffic.failed.append(f"stream: {response.status_code} {lines[-2:]}")


async def _look(running: Service, traffic: Traffic, stop: asyncio.Event) -> None:
    while not stop.is_set():
        for name, count in (await asyncio.to_thread(replicas, running)).items():
            traffic.most_replicas[name] = max(count, traffic.most_replicas[name])
        await asyncio.sleep(LOOK_EVERY_S)


def replicas(running: Service) -> Counter[str]:
    """Processes of replicas by deployment, those that drain included; `sections`: of all of its versions together."""
    found: Counter[str] = Counter()
    for process in psutil.Process(running.process.pid).children(recursive=True):
        title = command(process).strip()
        # A replica that does something says so after a dot.
        if title.startswith(REPLICA):
            deployment = title.removeprefix(REPLICA)
            name = deployment.split(".")[0]
            found[name] += 1
    return found


if __name__ == "__main__":
    main()
