"""Clients that disconnect while their rows wait free their places: what nobody waits for is not run."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.integration.service import Service, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROWS = 200
# 60 tokens of 2 ms: two replicas would need 12 s for all rows.
BODY = {"model": "emb:slow", "inputs": [" ".join(["fox"] * 58)] * ROWS}
SMALL = {"model": "emb:slow", "inputs": "fox"}
FREE_WITHIN_S = 8.0


async def test_a_client_that_disconnects_frees_its_place_in_the_queue(served: Service):
    before = served.info("emb", "slow")
    assert before["queued"] == 0
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
        leaving = asyncio.create_task(http.post("/embed", json=BODY))
        async with asyncio.timeout(10):
            while (await asyncio.to_thread(served.info, "emb", "slow"))["queued"] == 0:
                await asyncio.sleep(0.05)
        assert served.info("emb", "slow")["backlog_s"] > 1
        assert httpx.post(f"{served.url}/embed", json=SMALL, timeout=60).status_code == 429
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    assert wait_until(lambda: served.info("emb", "slow")["queued"] == 0, FREE_WITHIN_S)
    assert wait_until(lambda: served.info("emb", "slow")["backlog_s"] == 0, FREE_WITHIN_S)
    assert httpx.post(f"{served.url}/embed", json=SMALL, timeout=60).status_code == 200
    after = served.info("emb", "slow")
    assert after["withdrawn"] - before["withdrawn"] > ROWS / 2
    assert after["rows"] - before["rows"] < ROWS / 2
