"""Twice the sustainable load, open loop: what is accepted is answered in bounded time, the rest refused at once."""

from __future__ import annotations

import json

import httpx
import pytest

from fettle.bench.crew import run_apart
from fettle.bench.load import LoadPlan
from tests.conftest import MAX_QUEUE_S
from tests.integration.service import Service, wait_until

pytestmark = pytest.mark.slow

TEXT = " ".join(["fox"] * 18)
SUSTAINABLE = 49  # requests a second, see `VARIANTS`
SECONDS = 8.0
# The queue's limit, the batches that run meanwhile, and what a busy machine adds.
SLOWEST_S = 3 * MAX_QUEUE_S + 1.0
BACK_WITHIN_S = 10.0


def test_twice_the_sustainable_load(served: Service, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": TEXT}) + "\n")
    before = served.info("emb", "slow")
    report = run_apart(
        LoadPlan(
            url=f"{served.url}/v1/embeddings",
            model="emb:slow",
            texts=texts,
            rate=2.0 * SUSTAINABLE,
            arrivals="constant",
            seconds=SECONDS,
        )
    )
    print(report)
    assert set(report["statuses"]) == {"200", "429"}
    accepted, refused = report["statuses"]["200"], report["statuses"]["429"]
    assert refused == report["refused"]["with_retry_after"]
    # Most of what could be answered was, and the surplus was not.
    assert accepted > 0.4 * SUSTAINABLE * SECONDS
    assert refused > 0.3 * SUSTAINABLE * SECONDS
    assert report["max_ms"] < 1000 * SLOWEST_S
    assert report["refused"]["p50_ms"] < min(500, report["p50_ms"])

    assert wait_until(lambda: served.info("emb", "slow")["backlog_s"] == 0, BACK_WITHIN_S)
    after = served.info("emb", "slow")
    assert after["queued"] == 0
    assert after["withdrawn"] == before["withdrawn"]
    for _ in range(5):
        response = httpx.post(f"{served.url}/v1/embeddings", json={"model": "emb:slow", "input": TEXT}, timeout=30)
        assert response.status_code == 200
