"""Texts over real HTTP, through HAProxy, router, lane and replicas, are what the engine writes for each alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from fettle.generation import Prompt, Sampling, Token
from fettle.sampling import Draw, Sampler
from tests.integration.service import Service, wait_until
from tests.texts import FIRST_BYTE, IM_END, ids_of
from workers.fake_decoder import expected

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

WIDTH = FIRST_BYTE + 256
FREE_WITHIN_S = 5.0
# Bytes that are characters by themselves, so that texts can be compared.
ASCII = {FIRST_BYTE + byte: -100.0 for byte in range(128, 256)}
BIAS = {"logit_bias": {str(token): bias for token, bias in ASCII.items()}}
LONG = {"model": "lm:int4", "prompt": "on and on", "max_tokens": 450, "seed": 1, "ignore_eos": True, **BIAS}


def written(
    prompt: str, max_tokens: int, seed: int, choice: int = 0, *, endless: bool = False, temperature: float = 1.0
) -> str:
    """By one token after the other, from the fake model's definition."""
    ids = np.array(ids_of(prompt), np.int32)
    sampling = Sampling(seed=seed, temperature=temperature, logit_bias=ASCII)
    asked = Prompt("alone", ids, max_tokens, sampling, choice=choice)
    sampler, draw, tokens = Sampler(WIDTH), Draw(asked, WIDTH), list(ids)
    while draw.position < max_tokens:
        (token,) = sampler.sample(expected(np.array(tokens, np.int32), WIDTH)[None], [draw])
        assert isinstance(token, Token)
        if token.id == IM_END and not endless:
            break
        draw.take(token.id)
        tokens.append(token.id)
    return bytes(token - FIRST_BYTE for token in tokens[len(ids) :] if token >= FIRST_BYTE).decode("ascii")


async def until_running(served: Service, count: int, variant: str = "int4") -> None:
    """So many slots of a variant are taken."""
    assert await asyncio.to_thread(wait_until, lambda: served.info("lm", variant)["running"] == count, FREE_WITHIN_S), (
        served.info("lm", variant)
    )


async def post(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def streamed(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def test_many_prompts_at_once_are_answered_as_alone(served: Service):
    async def ask(http: httpx.AsyncClient, number: int) -> None:
        variant, tokens = ("bf16", "int4")[number % 2], 5 + number % 40
        body = {"model": f"lm:{variant}", "prompt": f"prompt {number}", "max_tokens": tokens, "seed": number, **BIAS}
        if number % 3:
            found = (await post(http, **body))["choices"][0]["text"]
        else:
            found = text_of(await streamed(http, **body))
        assert found == written(f"prompt {number}", tokens, number)

    async with httpx.AsyncClient(base_url=served.url, timeout=120) as http:
        await asyncio.gather(*(ask(http, number) for number in range(120)))
    assert served.info("lm", "int4")["running"] == 0


async def test_choices_and_prompts_of_one_request(served: Service):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
        body = {"prompt": ["one", "two"], "n": 3, "max_tokens": 12, "seed": 4, "temperature": 0.7, **BIAS}
        found = await post(http, model="lm:int4", **body)
    texts = [choice["text"] for choice in found["choices"]]
    right = [written(prompt, 12, 4, k, temperature=0.7) for prompt in ("one", "two") for k in range(3)]
    assert texts == right
    assert found["usage"]["completion_tokens"] >= sum(map(bool, texts))


async def test_who_hangs_up_frees_its_slots_at_once(served: Service):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
        for _ in range(3):
            async with http.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}) as response:
                lines = response.aiter_lines()
                for _ in range(4):
                    await anext(lines)
        await until_running(served, 0)
        waiting = asyncio.create_task(http.post("/v1/completions", json=LONG))
        await until_running(served, 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await until_running(served, 0)
        # All slots of the replicas are free again: as many texts as fit at once do not wait for each other.
        await asyncio.gather(*(post(http, model="lm:int4", prompt=f"p{n}", max_tokens=3) for n in range(32)))


async def test_more_than_the_queue_holds_is_refused_and_the_rest_is_answered(served: Service):
    body = {"model": "lm:bf16", "max_tokens": 60, "ignore_eos": True, **BIAS}
    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=httpx.Limits(max_connections=400)) as http:
        found = await asyncio.gather(
            *(http.post("/v1/completions", json={**body, "prompt": f"prompt {n}", "seed": n}) for n in range(300))
        )
    statuses = [response.status_code for response in found]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 60
    assert all("retry-after" in response.headers for response in found if response.status_code == 429)
    for number, response in enumerate(found):
        if response.status_code == 200 and number % 5 == 0:
            right = written(f"prompt {number}", 60, number, endless=True)
            assert response.json()["choices"][0]["text"] == right
    await until_running(served, 0, "bf16")


async def test_a_stream_says_that_its_connection_ends_and_a_whole_reply_keeps_its_own(served: Service):
    body = {"model": "lm:int4", "prompt": "x", "max_tokens": 4}
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            assert [line async for line in stream.aiter_lines() if line][-1] == "data: [DONE]"
        whole = await http.post("/v1/completions", json=body)
    assert stream.headers["connection"] == "close"
    assert "connection" not in whole.headers


async def test_a_grammar_is_kept_and_one_that_cannot_be_is_refused(served: Service):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
        found = await post(http, model="lm:int4", prompt="x", max_tokens=40, guided_regex="[a-f]{3}-[0-9]{4}", n=4)
        for choice in found["choices"]:
            assert len(choice["text"]) == 8
            assert choice["text"][3] == "-"
        bad = await http.post("/v1/completions", json={"model": "lm:int4", "prompt": "x", "guided_regex": "[a-"})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "guided_regex"
    assert served.info("lm", "int4")["running"] == 0


async def test_a_stream_outlives_its_replica(served: Service):
    """The other replica goes on after the tokens that were told."""
    replicas = served.replicas("lm.bf16")
    assert len(replicas) == 2
    bodies = [{**LONG, "model": "lm:bf16", "prompt": f"story {number}", "seed": number} for number in range(8)]
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as http:
        tasks = [asyncio.create_task(streamed(http, **body)) for body in bodies]
        await until_running(served, 8, "bf16")
        await asyncio.sleep(0.3)
        replicas[0].kill()
        found = await asyncio.gather(*tasks)
    assert served.info("lm", "bf16")["retried"] > 0
    for body, chunks in zip(bodies, found, strict=True):
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert text_of(chunks) == written(body["prompt"], body["max_tokens"], body["seed"], endless=True)
    assert await asyncio.to_thread(wait_until, lambda: len(served.replicas("lm.bf16")) == 2, 90.0)
