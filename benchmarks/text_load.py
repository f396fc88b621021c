"""A load client for text endpoints: streams over HTTP, and when each token came.

    python -m benchmarks.text_load PLAN_JSON

Any server that speaks OpenAI's completions as server-sent events. An open loop sends at Poisson times whatever comes
back, and latency counts from when a request was due, so a server that stalls is not let off; `streams` instead keeps so
many under way. Prints one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.arrivals import steady, times

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class TextPlan:
    """`rate` requests a second at Poisson times, or `streams` at a time; `body` is what all say beside their prompts.

    Goodput counts requests whose first token came within `ttft_ms` and whose others took at most `tpot_ms` on average.
    """

    url: str
    prompts: Sequence[str]
    body: dict[str, Any]
    tokens: int
    rate: float = 0.0
    streams: int = 0
    seconds: float = 20.0
    warm_up: float = 3.0
    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    seed: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    """One request, in seconds of `time.perf_counter`; `came` when each piece of text did."""

    due: float
    status: int = 0
    came: list[float] = field(default_factory=list)
    ended: float = 0.0


def main() -> None:
    plan = TextPlan(**json.loads(sys.argv[1]))
    print(json.dumps(asyncio.run(run(plan))), flush=True)


async def run(plan: TextPlan) -> dict[str, Any]:
    process = psutil.Process()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as http:
        begin = time.perf_counter()
        before = sum(process.cpu_times()[:2])
        found = await (_open(plan, http, begin) if plan.rate else _closed(plan, http, begin))
    return summary(plan, found, begin) | {"client_cpu_s": sum(process.cpu_times()[:2]) - before}


async def _open(plan: TextPlan, http: aiohttp.ClientSession, begin: float) -> list[Stream]:
    chosen = random.Random(plan.seed)
    tasks = []
    for at in times(steady(plan.rate, plan.warm_up + plan.seconds), "poisson", str(plan.seed)):
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        tasks.append(asyncio.create_task(_ask(plan, http, chosen.choice(plan.prompts), begin + at)))
    return list(await asyncio.gather(*tasks))


async def _closed(plan: TextPlan, http: aiohttp.ClientSession, begin: float) -> list[Stream]:
    chosen, found = random.Random(plan.seed), []

    async def client() -> None:
        while (now := time.perf_counter()) < begin + plan.warm_up + plan.seconds:
            found.append(await _ask(plan, http, chosen.choice(plan.prompts), now))

    await asyncio.gather(*(client() for _ in range(plan.streams)))
    return found


async def _ask(plan: TextPlan, http: aiohttp.ClientSession, prompt: str, due: float) -> Stream:
    stream = Stream(due)
    body = {**plan.body, "prompt": prompt, "max_tokens": plan.tokens, "stream": True}
    try:
        async with http.post(plan.url, json=body, headers=plan.headers) as response:
            stream.status = response.status
            async for line in response.content:
                if line.startswith(b"data: {") and response.status == 200:
                    stream.came.append(time.perf_counter())
    except (aiohttp.ClientError, TimeoutError):
        stream.status = 0
    stream.ended = time.perf_counter()
    return stream


def summary(plan: TextPlan, streams: Sequence[Stream], begin: float) -> dict[str, Any]:
    """Of the requests that were due after the warm-up; tokens a second of those that came in the window."""
    first, last = begin + plan.warm_up, begin + plan.warm_up + plan.seconds
    mine = [stream for stream in streams if first <= stream.due < last]
    good = [stream for stream in mine if stream.status == 200 and stream.came]
    ttft = np.array([stream.came[0] - stream.due for stream in good]) * 1000
    # The whole text is `plan.tokens` long by construction: nothing ends it before.
    tpot = np.array([(s.came[-1] - s.came[0]) / max(1, plan.tokens - 1) for s in good]) * 1000
    gaps = np.concatenate([np.diff(stream.came) for stream in good] or [np.empty(0)]) * 1000
    whole = np.array([stream.ended - stream.due for stream in good]) * 1000
    inside = sum(plan.tokens * np.mean([first <= at < last for at in stream.came]) for stream in streams if stream.came)
    fine = int(((ttft <= plan.ttft_ms) & (tpot <= plan.tpot_ms)).sum()) if good else 0
    return {
        "requests": len(mine),
        "statuses": {str(code): sum(s.status == code for s in mine) for code in sorted({s.status for s in mine})},
        "rps": round(len(good) / plan.seconds, 3),
        "tokens_per_s": round(float(inside) / plan.seconds, 1),
        "goodput_rps": round(fine / plan.seconds, 3),
        "ttft_ms": _quantiles(ttft),
        "tpot_ms": _quantiles(tpot),
        "inter_token_ms": _quantiles(gaps),
        "end_to_end_ms": _quantiles(whole),
    }


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    return {f"p{100 * q:g}": round(float(np.quantile(values, q)), 2) if len(values) else None for q in QUANTILES}


def as_json(plan: TextPlan) -> str:
    return json.dumps(asdict(plan))


if __name__ == "__main__":
    main()
