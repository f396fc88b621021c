"""Text generation for a long time, with clients that leave when they like: memory stays flat, and no slot is lost.

Streams and whole replies, short and long, greedy and sampled; a part hangs up before the first token, in the middle, or
reads slowly. Memory of the service's processes and taken slots are read every few seconds; afterwards all slots must be
free, every reply that was read to its end must be whole, and memory must not have grown by more than a tenth between
the second quarter and the last. The exit status is 1 otherwise.

    python -m benchmarks.soak build/debian-lm --minutes 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import Server, ServerSpec
from deployments.fastpath import free_port
from fettle.family import Family

LOG = Path("build/benchmark-logs/soak.log")
EVERY_S = 5.0
GROWTH = 1.1
SETTLE_S = 10.0
WORDS = [
    "a",
    "library",
    "for",
    "parsing",
    "fonts",
    "and",
    "small",
    "games",
    "written",
    "in",
    "a",
    "language",
    "that",
    "nobody",
    "uses",
]


@dataclass
class Soak:
    url: str
    model: str
    minutes: float
    clients: int
    seed: int
    endings: Counter[str] = field(default_factory=Counter)
    readings: list[tuple[float, int, float]] = field(default_factory=list)

    async def run(self, server: Server) -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(self.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
            end = time.monotonic() + 60 * self.minutes
            tasks = [asyncio.create_task(self._client(http, number, end)) for number in range(self.clients)]
            started = time.monotonic()
            while time.monotonic() < end:
                await asyncio.sleep(EVERY_S)
                self.readings.append((time.monotonic() - started, await self._taken(http), memory_mb(server)))
            await asyncio.gather(*tasks)
            await asyncio.sleep(SETTLE_S)
            self.readings.append((time.monotonic() - started, await self._taken(http), memory_mb(server)))

    async def _client(self, http: aiohttp.ClientSession, number: int, end: float) -> None:
        chance = random.Random(f"{self.seed} {number}")
        while time.monotonic() < end:
            try:
                self.endings[await self._one(http, chance)] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.endings[f"broken: {type(error).__name__}"] += 1
            await asyncio.sleep(chance.uniform(0, 0.2))

    async def _one(self, http: aiohttp.ClientSession, chance: random.Random) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": " ".join(chance.choices(WORDS, k=chance.randint(1, 120))),
            "max_tokens": chance.choice([1, 8, 60, 300]),
            "temperature": chance.choice([0.0, 1.0]),
            "n": chance.choice([1, 1, 1, 3]),
            "ignore_eos": chance.random() < 0.5,
            "stream": chance.random() < 0.7,
        }
        if chance.random() < 0.1:
            body["stop"] = [chance.choice(["the", "\n", "zzz" * 1000])]
        leaves = chance.random() < 0.4
        async with http.post("/v1/completions", json=body) as response:
            if response.status != 200:
                await response.read()
                return str(response.status)
            if not body["stream"]:
                whole = await response.json()
                return "whole" if len(whole["choices"]) == body["n"] else "INCOMPLETE"
            read = 0
            async for line in response.content:
                read += 1
                if leaves and read > chance.randint(0, 40):
                    return "left"
                if chance.random() < 0.002:
                    await asyncio.sleep(chance.uniform(0, 3))
                if line == b"data: [DONE]\n":
                    return "streamed"
        return "INCOMPLETE"

    async def _taken(self, http: aiohttp.ClientSession) -> int:
        async with http.get("/info") as response:
            families = (await response.json())["families"]
        return sum(variant["running"] + variant["queued"] for family in families for variant in family["variants"])

    def broken(self) -> list[str]:
        found = []
        if self.readings[-1][1]:
            found.append(f"{self.readings[-1][1]} slots are still taken")
        bad = {name: count for name, count in self.endings.items() if name not in ("whole", "streamed", "left", "429")}
        found += [f"{count} x {name}" for name, count in bad.items()]
        quarter = max(1, len(self.readings) // 4)
        early = statistics.median(mb for _, _, mb in self.readings[quarter : 2 * quarter])
        late = statistics.median(mb for _, _, mb in self.readings[-quarter:])
        if late > GROWTH * early:
            found.append(f"memory grew from {early:.0f} to {late:.0f} MB")
        return found


def memory_mb(server: Server) -> float:
    """Unshared memory of the router's and the replicas' processes."""
    return sum(process.memory_full_info().uss for process in server.processes("ray::ServeReplica")) / 2**20


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    name = Family.open(options.family).name
    port = free_port()
    model = f"{name}:{options.variant}"
    command = [sys.executable, "-m", "fettle.cli", "serve", str(options.family.absolute()), "--port", str(port)]
    command += ["--variant", options.variant, "--default", options.variant, "--no-dashboard"]
    probe = json.dumps({"model": model, "prompt": "x", "max_tokens": 1}).encode()
    spec = ServerSpec(command, f"http://127.0.0.1:{port}/v1/completions", probe)
    soak = Soak(f"http://127.0.0.1:{port}", model, options.minutes, options.clients, options.seed)
    with Server(spec, LOG) as server:
        asyncio.run(soak.run(server))
    broken = soak.broken()
    if not options.json:
        step = max(1, len(soak.readings) // 10)
        for at, taken, mb in soak.readings[::step]:
            print(f"{at:6.0f} s  {taken:3d} slots taken or wanted  {mb:7.0f} MB")
        print(dict(soak.endings))
        for line in broken:
            print(f"BROKEN: {line}")
    head = {"benchmark": "soak", "hardware": machine, "minutes": options.minutes, "clients": options.clients}
    found = {"endings": dict(soak.endings), "readings": soak.readings, "broken_promises": broken}
    print(json.dumps(head | found))
    sys.exit(1 if broken else 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--variant", default="onnx-int8")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
