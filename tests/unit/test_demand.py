"""What a router counts of the work that comes, and what it does where a variant has no replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deployments.api import build_api
from deployments.demand import ASKED_FOR_S, PRIOR_ROWS, Demand
from deployments.followers import FollowedRouters, FollowedVariant
from deployments.router import Router
from deployments.tickets import Terms
from fettle.family import Family
from fettle.scheduling import Entry
from tests.fakes import FakeVariant, make_fake_family, make_point, make_step
from tests.inprocess import client_of, make_router, slots_of

pytestmark = pytest.mark.anyio

VARIANTS = [FakeVariant("fp32"), FakeVariant("int8"), FakeVariant("tiny", tokens_read=3)]
# On `test` half of the rows go on from int8 to fp32.
ONE = make_point("one", 0.01, make_step("int8", 0.3), make_step("fp32"), cost=5.0)
FIVE = make_point("five", 0.05, make_step("tiny"), cost=1.0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory: Path = tmp_path_factory.mktemp("families") / "sections"
    return make_fake_family(directory, name="sections", variants=VARIANTS, points=[ONE, FIVE])


@pytest.fixture
def router(family: Family) -> Router:
    return make_router([family])


@pytest.fixture
def demand(router: Router) -> Demand:
    return router.families["sections"].demand


@pytest.fixture
async def client(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(build_api(router)) as client:
        yield client


def sleep(router: Router, *variants: str) -> None:
    for variant in variants:
        slots_of(router, "sections", variant).replicas = 0


def way(router: Router, name: str):
    menu = router.families["sections"].menu
    return next(way for way in (*menu.gears(1.0), menu.reference()) if way.name == name)


async def ask(client: httpx.AsyncClient, wish: float | str, **headers: str) -> httpx.Response:
    return await client.post("/classify", json={"input": "fox", "max_disagreement": wish}, headers=headers)


# Work that comes.


def test_a_request_counts_for_its_whole_way(router, demand):
    demand.comes(way(router, "one"), [4, 4])
    # A row takes 1 ms by the table.
    assert demand.figures("int8")["work_s"] == pytest.approx(0.002)
    reached = way(router, "one").stretches[1].reach
    assert demand.figures("fp32")["work_s"] == pytest.approx(0.002 * reached)
    assert demand.figures("fp32")["rows"] == pytest.approx(2 * reached)
    assert demand.figures("tiny")["work_s"] == 0


def test_how_many_go_on_is_learnt_from_production(router, demand):
    one = way(router, "one")
    before = demand.reach(one)[1]
    for _ in range(40):
        demand.passed(one, 0, came=int(PRIOR_ROWS), on=int(0.1 * PRIOR_ROWS))
    assert before > 0.4
    assert demand.reach(one)[1] == pytest.approx(0.1, abs=0.02)


def test_what_is_refused_counts_as_much_as_others(router, demand):
    one = way(router, "one")
    demand.comes(one, [4, 4])
    demand.turned_away(one)
    assert demand.figures("int8")["work_s"] == pytest.approx(0.002), "nothing waits, so more replicas would not help"
    router.families["sections"].batchers["int8"].queue.push(Entry(length=4, cost_ms=1.0, arrived=0.0, due=1.0))
    demand.turned_away(way(router, "five"))
    assert demand.figures("tiny")["work_s"] == 0, "nothing is known of this way yet"
    demand.turned_away(one)
    assert demand.figures("int8")["work_s"] == pytest.approx(0.004)
    assert demand.requests == 4


def test_a_later_pace_does_not_change_what_has_come(router, demand):
    demand.comes(way(router, "five"), [4])
    before = demand.figures("tiny")["work_s"]
    router.families["sections"].batchers["tiny"]._pace = 5.0
    assert demand.figures("tiny")["work_s"] == before


async def test_requests_are_counted_where_they_are_answered(client, demand):
    assert (await ask(client, 0.05)).status_code == 200
    assert (await ask(client, "exact")).status_code == 200
    assert demand.requests == 2
    assert demand.figures("int8")["rows"] == 1
    assert demand.figures("fp32")["rows"] > 1


# Variants that do not run.


async def test_another_point_of_the_class_answers_while_one_does_not_run(client, router, demand):
    sleep(router, "int8")
    reply = await ask(client, 0.05)
    assert reply.headers["x-fettle-point"] == "five"
    assert demand.figures("int8")["waiting"], "it is missed, so that it comes back"
    assert not demand.figures("tiny")["waiting"]


async def test_a_dearer_point_answers_where_no_cheaper_one_runs(client, router, demand):
    sleep(router, "tiny")
    family = router.families["sections"]
    ways = family.menu.gears(0.05)
    assert [ways[number].name for number in demand.order(ways, gear=1)] == ["one"]
    assert demand.figures("tiny")["waiting"]


async def test_the_class_is_never_left(router):
    sleep(router, "int8")
    # Of what is certified at 1 % nothing runs, and `five` is not.
    ways = router.families["sections"].menu.gears(0.01)
    assert router.families["sections"].demand.order(ways, gear=0) == [0]


async def test_what_alone_may_answer_is_waited_for(client, router, demand):
    slots = slots_of(router, "sections", "fp32")
    slots.replicas = 0
    slots.gate.clear()
    asking = asyncio.create_task(ask(client, "exact"))
    await asyncio.sleep(0.05)
    assert not asking.done()
    assert demand.figures("fp32")["waiting"]
    slots.gate.set()
    FollowedVariant(Resizable(slots), demand, "fp32").resize(1)
    assert (await asking).status_code == 200


async def test_the_wait_for_a_start_teaches_no_pace(client, router):
    sleep(router, "fp32")
    assert (await ask(client, "exact")).status_code == 200
    assert router.families["sections"].batchers["fp32"].speed.pace == 1.0


async def test_a_deadline_before_a_start_is_refused_at_once(client, router):
    sleep(router, "fp32")
    reply = await ask(client, "exact", **{"x-request-timeout-seconds": "2"})
    assert reply.status_code == 504
    assert (await ask(client, "exact", **{"x-request-timeout-seconds": "60"})).status_code == 200


def test_starts_are_timed(router, demand, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("deployments.demand.time.monotonic", lambda: now[0])
    slots = slots_of(router, "sections", "fp32")
    slots.replicas = 0
    exact = way(router, "fp32")
    demand.missing(exact)
    guess = demand.wait_s("fp32")
    assert guess > 5
    now[0] += 3
    assert demand.wait_s("fp32") == pytest.approx(guess - 3)
    assert demand.can_wait(exact, Terms(now[0], deadline=now[0] + guess))
    assert not demand.can_wait(exact, Terms(now[0], deadline=now[0] + 1))
    now[0] += 37
    FollowedVariant(Resizable(slots), demand, "fp32").resize(1)
    assert demand.wait_s("fp32") == 0
    slots.replicas = 0
    assert demand.wait_s("fp32") > guess + 5
    now[0] += ASKED_FOR_S + 1
    assert not demand.figures("fp32")["waiting"]


def test_routers_share_what_there_is(router):
    queues = list(router.families["sections"].batchers.values())
    FollowedRouters(queues).resize(4)
    assert [queue.routers for queue in queues] == [4, 4, 4]
    FollowedRouters(queues).resize(0)
    assert queues[0].routers == 1


class Resizable:
    def __init__(self, slots) -> None:
        self._slots = slots

    def resize(self, replicas: int) -> None:
        self._slots.replicas = replicas
