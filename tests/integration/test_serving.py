"""Answers over real HTTP, through HAProxy, router and replicas, are exactly those of the engine."""

from __future__ import annotations

import asyncio
import random

import httpx
import numpy as np
import psutil
import pytest

from fettle.answers import normalized, probabilities
from tests.conftest import TASKS
from tests.fakes import CLS, SEP, WORDS, token_id
from tests.integration.service import Service, command
from workers.fake import expected

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

REQUESTS = 400
CONNECTIONS = 48
LIMIT = 64


def ids_of(words: list[str]) -> np.ndarray:
    """What the tokenizer makes of them, and the cut at the model's limit."""
    return np.array([CLS, *(token_id(word) for word in words[: LIMIT - 2]), SEP], np.int32)


async def ask(client: httpx.AsyncClient, words: list[str], model: str) -> None:
    family = model.partition(":")[0]
    path = "/classify" if family == "sections" else "/v1/embeddings"
    response = await client.post(path, json={"model": model, "input": " ".join(words)})
    assert response.status_code == 200, response.text
    body = response.json()
    task = TASKS[family]
    raw = expected(ids_of(words), task.width)[None]
    if family == "sections":
        wanted, got = probabilities(raw, task)[0], body["data"][0]["probs"]
    else:
        wanted, got = normalized(raw)[0], body["data"][0]["embedding"]
    assert np.array_equal(np.array(got, np.float32), wanted)
    assert body["fettle"]["truncated"] == int(len(words) > LIMIT - 2)
    if ":" in model:
        assert body["model"] == model


async def test_each_of_hundreds_of_concurrent_requests_gets_its_own_answer(served: Service):
    """Two families, pinned variants and all lengths, in one stream over many connections."""
    chance = random.Random(1)
    words = [word for word in WORDS if word not in ("crash", "poison")]
    models = ["sections", "sections:fp32", "sections:fragile", "emb", "emb:int8"]
    todo = [(chance.choices(words, k=chance.randrange(1, 80)), chance.choice(models)) for _ in range(REQUESTS)]

    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:

        async def work() -> None:
            while todo:
                await ask(client, *todo.pop())

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))


async def test_requests_that_arrive_together_share_batches(served: Service):
    before = served.info("emb", "int8")
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        await asyncio.gather(*(ask(client, ["fox"] * 10, "emb:int8") for _ in range(200)))
    after = served.info("emb", "int8")
    assert after["rows"] - before["rows"] == 200
    assert after["batches"] - before["batches"] < 200


async def test_one_request_with_many_inputs(served: Service):
    texts = [[WORDS[n % 90 + 10]] * (n % 60 + 1) for n in range(256)]
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        response = await client.post("/embed", json={"inputs": [" ".join(words) for words in texts], "model": "emb"})
    wanted = normalized(np.stack([expected(ids_of(words), TASKS["emb"].width) for words in texts]))
    got = np.array(response.json(), np.float32)
    assert got == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b'{"inputs": "\xff"}', 400),
        (b"[" * 100_000, 400),
        (b'{"inputs": "' + b"fox " * 1_250_000 + b'"}', 413),
        (b'{"inputs": [' + b'"fox",' * 9_999 + b'"fox"], "model": "emb"}', 413),
        (b'{"inputs": "fox", "model": "nobody"}', 404),
    ],
    ids=["malformed", "no UTF-8", "nested", "5 MB", "10,000 inputs", "unknown model"],
)
async def test_bad_input_gets_its_error_through_the_proxy_too(served: Service, content: bytes, status: int):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        response = await client.post("/embed", content=content, headers={"content-type": "application/json"})
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert (await client.get("/health")).status_code == 200


async def test_a_chunked_body_without_end_is_cut_off(served: Service):
    async def chunks():
        for _ in range(100):
            yield b" " * 100_000

    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        response = await client.post("/embed", content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413


async def test_unknown_paths_and_methods_have_the_error_shape(served: Service):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        for response, status in ((await client.get("/nowhere"), 404), (await client.delete("/embed"), 405)):
            assert response.status_code == status
            assert "message" in response.json()["error"]


async def test_ready_and_documented(served: Service):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json", "/v1/models", "/quality", "/stats"):
            assert (await client.get(path)).status_code == 200


def test_replicas_are_forks_of_one_process(served: Service):
    replicas = served.replicas("")
    assert len(replicas) > 6
    parents = {replica.ppid() for replica in replicas}
    assert len(parents) == 1
    assert "forkserver.py" in command(psutil.Process(parents.pop()))


async def test_rays_dashboard_shows_the_deployments_and_their_autoscaling(served: Service):
    """What `serve status` and the dashboard's Serve page read."""
    async with httpx.AsyncClient(timeout=60) as client:
        details = (await client.get(f"{served.dashboard}/api/serve/applications/")).json()
    application = details["applications"]["fettle"]
    assert application["status"] == "RUNNING"
    # What serves a variant says of which version, after its name.
    deployments = {name.partition("@")[0]: found for name, found in application["deployments"].items()}
    variants = {"sections.fp32", "sections.fragile", "emb.int8", "emb.slow", "lm.bf16", "lm.int4"}
    assert set(deployments) == {*variants, "RouterIngress", "Monitor"}
    for name in variants:
        assert deployments[name]["status"] == "HEALTHY"
        assert len(deployments[name]["replicas"]) == 2
        scaling = deployments[name]["deployment_config"]["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 2)
        assert scaling["target_ongoing_requests"] == 1.0
