"""A replica that dies under load costs retries, and no request; a text that kills replicas fails alone."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.integration.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

CLIENTS = 16
KILL_AFTER_S = 1.5
BACK_WITHIN_S = 90.0
PATIENCE_S = 120.0


async def until_replicas(served: Service, deployment: str, *, without: int | None = None) -> None:
    """Wait until there are two replicas, none of them the process `without`."""
    async with asyncio.timeout(BACK_WITHIN_S):
        while True:
            pids = {process.pid for process in await asyncio.to_thread(served.replicas, deployment)}
            if len(pids - {without}) >= 2:
                return
            await asyncio.sleep(0.2)


async def test_no_request_fails_when_a_replica_is_killed_under_load(served: Service):
    await until_replicas(served, "sections.fp32")
    statuses: list[int] = []
    stop = asyncio.Event()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        while not stop.is_set():
            body = {"model": "sections:fp32", "input": [f"word{number} word{n}" for n in range(3)]}
            response = await http.post("/classify", json=body)
            statuses.append(response.status_code)

    async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as http:
        clients = [asyncio.create_task(client(http, number)) for number in range(CLIENTS)]
        await asyncio.sleep(KILL_AFTER_S)
        before = served.info("sections", "fp32")["rows"]
        victim = served.replicas("sections.fp32")[0]
        victim.kill()
        await until_replicas(served, "sections.fp32", without=victim.pid)
        await asyncio.sleep(KILL_AFTER_S)
        stop.set()
        await asyncio.gather(*clients)
    assert set(statuses) == {200}
    assert served.info("sections", "fp32")["rows"] > before
    assert served.info("sections", "fp32")["queued"] == 0


async def test_a_text_that_kills_replicas_fails_alone(served: Service):
    """Its neighbours in the batch, and those who come while the replicas start again, are answered."""
    await until_replicas(served, "sections.fragile")
    started = time.monotonic()

    async def ask(http: httpx.AsyncClient, text: str) -> httpx.Response:
        return await http.post("/classify", json={"model": "sections:fragile", "input": text})

    async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as http:
        neighbours = [asyncio.create_task(ask(http, f"word{number} fox")) for number in range(10)]
        killer = asyncio.create_task(ask(http, "the crash"))
        neighbours += [asyncio.create_task(ask(http, f"word{number} fox")) for number in range(10)]
        await asyncio.sleep(2)
        neighbours += [asyncio.create_task(ask(http, f"word{number} the")) for number in range(5)]
        replies = await asyncio.gather(*neighbours)
        failed = await killer
    assert [reply.status_code for reply in replies] == [200] * len(replies)
    assert failed.status_code == 503
    assert failed.json()["error"]["type"] == "unavailable_error"
    print(f"all answered after {time.monotonic() - started:.1f} s")
    await until_replicas(served, "sections.fragile")
    assert served.info("sections", "fragile")["queued"] == 0
