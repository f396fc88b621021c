"""Two routers and a monitor, each killed in turn under load: every answer is right, and nothing that was known is lost.

A variant that corrupts one answer in twenty is found out, and its point is revoked at both routers; traffic goes on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

import fettle
from fettle.config import FamilyConfig, MonitorConfig, ReplicaConfig, ServeConfig
from fettle.evidence import expected_samples
from fettle.family import Family
from fettle.local import Prediction
from tests.fakes import WORDS, FakeVariant, make_fake_family, make_point, make_step
from tests.integration.service import Service, service

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ALPHA, DELTA = 0.01, 0.01
VARIANTS = [
    FakeVariant("fp32", ms_per_call=2, ms_per_token=0.05),
    FakeVariant("cheap", ms_per_call=1, ms_per_token=0.01, stages=2),
    FakeVariant("corrupt", ms_per_call=1, corrupt_every=20),
]
POINTS = [
    make_point("within-0.01", ALPHA, make_step("corrupt"), cost=2.0),
    make_point("within-0.05", 0.05, make_step("cheap", 0.35, 0.05), make_step("fp32"), cost=1.0),
]
CLIENTS = 12
PATIENCE_S = 120.0
PAUSE_S = 0.8


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    where = tmp_path_factory.mktemp("promises")
    return {
        "sound": make_fake_family(where / "sound", name="sound", variants=VARIANTS[:2], points=POINTS[1:]),
        "broken": make_fake_family(
            where / "broken", name="broken", variants=[VARIANTS[0], VARIANTS[2]], points=POINTS[:1]
        ),
    }


@pytest.fixture(scope="module")
def running(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = ServeConfig(
        families=[FamilyConfig(path=str(family.directory)) for family in families.values()],
        replicas=ReplicaConfig(min_replicas=1, max_replicas=1),
        monitor=MonitorConfig(share=1.0, delta=DELTA),
        routers=2,
    )
    with service(config, tmp_path_factory.mktemp("promises-service") / "log") as started:
        yield started


@dataclass
class Traffic:
    """What clients that never pause were told; `failed` has what they got instead of an answer."""

    truth: dict[tuple[str, Any], Prediction]
    replies: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def note(self, text: str, level: Any, response: httpx.Response) -> None:
        if response.status_code != 200:
            self.failed.append(f"{response.status_code} {response.text[:200]}")
            return
        body = response.json()
        said, expected = body["fettle"], self.truth[text, level]
        got = (body["data"][0]["label"], said["variant"], int(said["stage"]))
        if got != (expected.answer, expected.variant, expected.stage):
            self.wrong.append((text, level, body))
        self.replies.append(said)


def expected_answers(family: Family) -> dict[tuple[str, Any], Prediction]:
    chance = random.Random(3)
    texts = [" ".join(chance.choices(WORDS[6:], k=chance.randrange(2, 40))) for _ in range(80)]
    with fettle.load(family.directory) as local:
        return {
            (text, level): found
            for level in ("exact", 0.05)
            for text, found in zip(texts, local.predict(texts, level), strict=True)
        }


@asynccontextmanager
async def load_on(service: Service, truth: dict[tuple[str, Any], Prediction]):
    """Clients that ask all the time, in the class and exactly, each on a connection of its own."""
    traffic, stop = Traffic(truth), asyncio.Event()

    async def client(http: httpx.AsyncClient, seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            text, level = chance.choice(list(truth))
            try:
                response = await http.post(
                    "/classify", json={"model": "sound", "input": text, "max_disagreement": level}
                )
            except httpx.TransportError as error:
                traffic.failed.append(repr(error))
                continue
            traffic.note(text, level, response)

    async with httpx.AsyncClient(base_url=service.url, timeout=PATIENCE_S) as http:
        clients = [asyncio.create_task(client(http, seed)) for seed in range(CLIENTS)]
        await asyncio.sleep(PAUSE_S)
        yield traffic
        await asyncio.sleep(PAUSE_S)
        stop.set()
        await asyncio.gather(*clients)


async def until(true, within_s: float = 90.0) -> None:
    async with asyncio.timeout(within_s):
        while not await asyncio.to_thread(true):
            await asyncio.sleep(0.2)


def quality(service: Service, family: str) -> dict[str, Any]:
    families = httpx.get(f"{service.url}/quality", timeout=30).json()["families"]
    [points] = [found["points"] for found in families if found["name"] == family]
    return points[0] if points else {}


def restarted(service: Service, deployment: str, victim: psutil.Process, count: int = 1):
    def check() -> bool:
        pids = {process.pid for process in service.replicas(deployment)}
        return victim.pid not in pids and len(pids) >= count

    return check


async def test_a_killed_worker_costs_no_request(running: Service, families: dict[str, Family]):
    truth = await asyncio.to_thread(expected_answers, families["sound"])
    async with load_on(running, truth) as traffic:
        victim = running.replicas("sound.cheap")[0]
        victim.kill()
        await until(restarted(running, "sound.cheap", victim))
    assert traffic.failed == []
    assert traffic.wrong == []
    assert {reply["bound"] == "exact" for reply in traffic.replies} == {True, False}


async def test_a_killed_monitor_costs_neither_requests_nor_evidence(running: Service, families: dict[str, Family]):
    truth = await asyncio.to_thread(expected_answers, families["sound"])
    async with load_on(running, truth) as traffic:
        await until(lambda: quality(running, "sound").get("shadows", 0) > 0)
        before = quality(running, "sound")["shadows"]
        victim = running.replicas("Monitor")[0]
        victim.kill()
        await until(restarted(running, "Monitor", victim))
        await until(lambda: quality(running, "sound")["shadows"] > before)
    assert traffic.failed == []
    assert traffic.wrong == []
    assert quality(running, "sound")["status"] == "watched"


async def test_what_a_surviving_router_accepted_is_answered(running: Service, families: dict[str, Family]):
    """The killed one loses what it held, one request a client at most; afterwards all is as before."""
    truth = await asyncio.to_thread(expected_answers, families["sound"])
    before = quality(running, "sound")["shadows"]
    async with load_on(running, truth) as traffic:
        victim = running.replicas("RouterIngress")[0]
        victim.kill()
        await until(restarted(running, "RouterIngress", victim, 2))
        lost = len(traffic.failed)
        await asyncio.sleep(2 * PAUSE_S)
        routers = {reply["router"] for reply in traffic.replies[-40:]}
    assert lost <= 3 * CLIENTS, traffic.failed
    assert len(traffic.failed) == lost
    assert traffic.wrong == []
    assert routers
    assert quality(running, "sound")["shadows"] >= before


async def test_a_corrupt_worker_is_found_out_and_its_point_revoked_at_every_router(running: Service):
    chance = random.Random(5)
    revoked_from = None
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as http:

        async def ask() -> dict[str, Any]:
            text = " ".join(chance.choices(WORDS[6:], k=10))
            response = await http.post("/classify", json={"model": "broken", "input": text})
            assert response.status_code == 200, response.text
            said: dict[str, Any] = response.json()["fettle"]
            return said

        for number in range(400):
            said = await asyncio.gather(*(ask() for _ in range(4)))
            if all(reply["point"] is None for reply in said):
                revoked_from = number
                break
            await asyncio.sleep(0.05)
        assert revoked_from is not None, quality(running, "broken")
        await until(lambda: quality(running, "broken").get("status") == "revoked")
        await asyncio.sleep(2 * PAUSE_S)
        after = [await ask() for _ in range(60)]
    assert {reply["bound"] for reply in after} == {"exact"}
    assert {reply["variant"] for reply in after} == {"fp32"}
    assert len({reply["router"] for reply in after}) == 2
    state = quality(running, "broken")
    # One in twenty is wrong, where one in a hundred was promised.
    assert state["shadows"] <= 4 * expected_samples(0.05, ALPHA, DELTA)
    assert state["evidence"] >= state["alarm_at"] == 1 / DELTA
