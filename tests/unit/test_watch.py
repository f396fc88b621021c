"""The watch over what is promised, with the real monitor in this process: drawn, compared, reported, revoked."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments import schemas, watch
from deployments.api import build_api
from deployments.monitor import Monitor, MonitorReply, RouterReport
from deployments.router import Inferred, Router, Wishes
from deployments.watch import Watch
from fettle.config import FamilyConfig, MonitorConfig
from fettle.evidence import alarms
from fettle.family import Family
from fettle.gears import Gear
from fettle.manifest import Head, Task, TaskKind
from fettle.points import fingerprint
from fettle.quality import Pair, PointState
from fettle.recertify import recertify
from fettle.scheduling import Priority
from tests.fakes import (
    WORDS,
    FakeVariant,
    give_points,
    make_fake_family,
    make_point,
    make_step,
    renewed,
    token_id,
)
from tests.inprocess import client_of, make_router, monitoring, slots_of
from workers.fake import FakeEngine, FakeParameters

pytestmark = pytest.mark.anyio

PATIENCE_S = 30.0
# Answers every row as the reference does, until it is told to corrupt some.
HONEST = [FakeVariant("fp32"), FakeVariant("exits", stages=2), FakeVariant("cheap")]
CORRUPT = [*HONEST[:2], FakeVariant("cheap", corrupt_every=4)]
CAREFUL = make_point("careful", 0.01, make_step("exits", 2.0, 0.3), make_step("fp32"), cost=5.0)
CHEAP = make_point("cheap", 0.05, make_step("cheap"), cost=1.0)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_fake_family(tmp_path / "family", variants=CORRUPT, points=[CAREFUL, CHEAP])


@pytest.fixture
async def monitor(family: Family) -> AsyncIterator[Monitor]:
    async with monitoring([family]) as monitor:
        yield monitor


@dataclass
class Wire:
    """Between router and monitor. `before` and `after` may break a call; `reports` are those that were tried."""

    monitor: Monitor
    before: list[Exception] = field(default_factory=list)
    after: list[Exception] = field(default_factory=list)
    reports: list[RouterReport] = field(default_factory=list)

    async def send(self, report: RouterReport) -> MonitorReply:
        self.reports.append(report)
        if self.before:
            raise self.before.pop(0)
        reply = await self.monitor.sync(report)
        if self.after:
            raise self.after.pop(0)
        return reply

    def pairs(self) -> list[Pair]:
        return list({pair.id: pair for report in self.reports for pair in report.pairs}.values())


async def started(monitor: Monitor | Wire, *families: Family, share: float = 1.0, **more: Any) -> Router:
    """A router that has had its first word from the monitor."""
    send = monitor.send if isinstance(monitor, Wire) else monitor.sync
    router = make_router(families, send=send, share=share, **more)
    await router.watch.report()
    return router


def text(chance: random.Random) -> str:
    return " ".join(
        chance.choices([word for word in WORDS if word not in ("poison", "crash")], k=chance.randint(1, 20))
    )


async def ask(router: Router, texts: list[str], *, model: str = "fake", **wishes: Any) -> Inferred:
    asked = router.ask(model, TaskKind.CLASSIFY, Wishes(**wishes))
    return await router.infer(asked, await router.tokenize(asked.family, texts))


async def traffic(router: Router, rows: int, tolerance: float | str = 0.05, seed: int = 1) -> list[Inferred]:
    """Requests of one to three rows, many at a time; their comparisons are done when this returns."""
    chance = random.Random(seed)
    texts = [text(chance) for _ in range(rows)]
    requests = []
    while texts:
        size = chance.randint(1, 3)
        requests.append(texts[:size])
        texts = texts[size:]
    found = await asyncio.gather(*(ask(router, each, max_disagreement=tolerance) for each in requests))
    await compared(router)
    return list(found)


async def compared(router: Router) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*router.watch._comparing)


def under_load(router: Router, tolerance: float = 0.05) -> None:
    """The class takes its cheapest point."""
    router.families["fake"].gearbox._gears[tolerance, False] = Gear(number=1)


def point_names(found: list[Inferred]) -> set[str]:
    return {inferred.way.name for inferred in found}


def state_of(router: Router, point: str) -> PointState:
    [state] = [state for state in router.watch.states if state.point == point]
    return state


# What is drawn.


async def nothing(report: RouterReport) -> MonitorReply:
    return MonitorReply((), {})


@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
def test_each_row_is_drawn_with_the_same_chance(share):
    drawing = Watch(send=nothing, share=share, seed=3)
    drawn = [row for _ in range(5000) for row in drawing.draw(4)]
    deviation = np.sqrt(20_000 * share * (1 - share))
    assert abs(len(drawn) - 20_000 * share) < 4 * deviation
    counts = np.bincount(drawn, minlength=4)
    assert abs(counts - 5000 * share).max() < 4 * deviation / 2


def test_all_or_nothing():
    assert Watch(send=nothing, share=1.0).draw(5) == [0, 1, 2, 3, 4]
    assert Watch(send=nothing, share=0.0).draw(5) == []
    assert Watch(send=None, share=1.0).draw(5) == [], "there is nobody to tell"


async def test_without_a_monitor_nothing_is_kept(family):
    router = make_router([family])
    await traffic(router, 30)
    assert not router.watch._seen
    assert not router.watch._pairs
    await router.watch.report()


async def test_what_is_drawn_does_not_depend_on_class_answer_or_load(monitor, family):
    drawn = []
    for tolerance, number in ((0.05, 0), (0.05, 1), ("exact", 0)):
        router = await started(monitor, family, share=0.3)
        router.families["fake"].gearbox._gears[0.05, False] = Gear(number=number)
        mine: list[list[int]] = []
        real = router.watch.draw

        def noting(rows: int, real: Callable[[int], list[int]] = real, mine: list[list[int]] = mine) -> list[int]:
            mine.append(real(rows))
            return mine[-1]

        router.watch.draw = noting  # type: ignore[method-assign]
        await traffic(router, 60, tolerance)
        drawn.append(mine)
    assert drawn[0] == drawn[1] == drawn[2]


# What is compared.


async def test_an_honest_point_has_no_disagreement(tmp_path):
    """In requests of several rows and mixed batches each row is compared with its own answer."""
    honest = make_fake_family(tmp_path / "honest", variants=HONEST, points=[CAREFUL, CHEAP])
    async with monitoring([honest]) as monitor:
        router = await started(monitor, honest)
        await traffic(router, 150)
        under_load(router)
        await traffic(router, 150)
        await router.watch.report()
        for name in ("careful", "cheap"):
            state = state_of(router, name)
            assert (state.shadows, state.disagreements, state.status) == (150, 0, "watched")


async def test_every_wrong_answer_that_a_client_got_is_counted(monitor, family):
    router = await started(monitor, family)
    under_load(router)
    found = await traffic(router, 40)
    await router.watch.report()
    # The fake corrupts every fourth answer that it gives.
    state = state_of(router, "cheap")
    assert (state.shadows, state.disagreements) == (40, 10)
    assert point_names(found) == {"cheap"}


async def test_a_share_of_the_rows_is_compared(monitor, family):
    router = await started(monitor, family, share=0.2)
    under_load(router)
    await traffic(router, 300)
    await router.watch.report()
    shadows = state_of(router, "cheap").shadows
    assert 35 <= shadows <= 85
    assert sum(slots_of(router, "fake", "fp32").batches) == shadows, "the reference does nothing else"


@pytest.mark.parametrize(
    ("model", "wishes"),
    [
        ("fake:cheap", {}),
        ("fake:fp32", {}),
        ("fake", {"max_disagreement": "exact"}),
        ("fake", {"max_disagreement": 0.001}),
    ],
)
async def test_what_promises_nothing_new_is_not_compared(monitor, family, model, wishes):
    wire = Wire(monitor)
    router = await started(wire, family)
    for _ in range(5):
        await ask(router, ["the fox"], model=model, **wishes)
    assert not router.watch._comparing
    await router.watch.report()
    assert wire.pairs() == []


async def test_a_degraded_answer_counts_for_the_point_that_gave_it(monitor, family):
    router = await started(monitor, family)
    router.families["fake"].gearbox._gears[0.01, True] = Gear(number=1)
    inferred = await ask(router, ["the fox"], max_disagreement=0.01, allow_degraded=True)
    assert inferred.degraded
    await compared(router)
    await router.watch.report()
    assert state_of(router, "cheap").shadows == 1


async def test_numbers_are_not_compared(tmp_path):
    task = Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, width=1)
    point = make_point("p", 0.05, make_step("cheap"))
    stars = make_fake_family(tmp_path / "stars", task=task, variants=HONEST, points=[point])
    async with monitoring([stars]) as monitor:
        wire = Wire(monitor)
        router = await started(wire, stars)
        await traffic(router, 10)
        await router.watch.report()
        assert wire.pairs() == []
        # Where they were answered is seen all the same.
        assert [seen.answered for report in wire.reports for seen in report.places] == [((10,),)]


async def test_without_the_reference_nothing_is_compared(monitor, family):
    settings = {"fake": FamilyConfig(path=str(family.directory), variants=["cheap"], max_disagreement=0.05)}
    router = await started(monitor, family, settings=settings)
    await traffic(router, 10)
    assert not router.watch._comparing
    await router.watch.report()
    assert state_of(router, "cheap").shadows == 0


async def test_a_row_that_the_reference_cannot_do_is_no_pair(tmp_path, caplog):
    variants = [FakeVariant("fp32", fail_on_token=token_id("poison")), *HONEST[1:]]
    made = make_fake_family(tmp_path / "family", variants=variants, points=[CHEAP])
    async with monitoring([made]) as monitor:
        router = await started(monitor, made)
        with caplog.at_level(logging.WARNING, "ray.serve.fettle"):
            await asyncio.gather(*(ask(router, [each], max_disagreement=0.05) for each in ("the poison", "the fox")))
            await compared(router)
        await router.watch.report()
        assert state_of(router, "cheap").shadows == 1
        assert "could not be compared" in caplog.text


async def test_comparisons_wait_for_a_gap_and_are_no_load(monitor, family):
    router = await started(monitor, family)
    served = router.families["fake"]
    slots = slots_of(router, "fake", "fp32")
    slots.gate.clear()
    # The reference is busy with a request of its own.
    busy = asyncio.ensure_future(ask(router, ["the fox"], max_disagreement="exact"))
    async with asyncio.timeout(PATIENCE_S):
        while not slots.batches:
            await asyncio.sleep(0)
    under_load(router)
    await asyncio.gather(*(ask(router, ["the fox"], max_disagreement=0.05) for _ in range(20)))
    batcher = served.batchers["fp32"]
    async with asyncio.timeout(PATIENCE_S):
        while len(batcher.queue.waiting(Priority.SHADOW)) < 20:
            await asyncio.sleep(0)
    assert batcher.queue.work_ms() == pytest.approx(1.0), "the one row of the request"
    assert slots.batches == [1]
    slots.gate.set()
    await busy
    await compared(router)
    assert sum(slots.batches) == 21


async def test_under_a_load_without_gaps_draws_are_given_up(monitor, family, monkeypatch):
    monkeypatch.setattr(watch, "MOST_PENDING", 10)
    router = await started(monitor, family)
    for batcher in router.families["fake"].batchers.values():
        batcher.calm = lambda: False
    for _ in range(10):
        await ask(router, ["the fox"] * 3, max_disagreement=0.05)
    assert len(router.watch._comparing) == 10
    for batcher in router.families["fake"].batchers.values():
        batcher.calm = lambda: True
    await compared(router)
    await router.watch.report()
    assert state_of(router, "careful").shadows == 10


async def test_comparisons_are_not_counted_as_answers(monitor, family):
    router = await started(monitor, family)
    await traffic(router, 30)
    [stretch] = router.watch._seen.values()
    assert sum(map(sum, stretch.answered)) == 30
    assert len(stretch.scores) == 30


# Alarms.


async def alarmed(router: Router, rows: int = 60) -> None:
    """Enough traffic on the corrupt variant."""
    under_load(router)
    assert point_names(await traffic(router, rows)) == {"cheap"}
    assert alarms(rows // 4, rows, 0.05, 0.01)
    await router.watch.report()
    assert state_of(router, "cheap").status == "revoked"


async def test_a_point_that_breaks_its_promise_is_not_used_any_more(monitor, family):
    router = await started(monitor, family)
    await alarmed(router)
    under_load(router)
    # The next point of the class answers, and is not revoked with it.
    assert point_names(await traffic(router, 40)) == {"careful"}
    await router.watch.report()
    assert state_of(router, "careful").status == "watched"


async def test_where_no_other_point_is_left_the_reference_answers(tmp_path):
    only = make_fake_family(tmp_path / "only", variants=CORRUPT, points=[CHEAP])
    async with monitoring([only]) as monitor:
        router = await started(monitor, only)
        await alarmed(router)
        [inferred] = await traffic(router, 1)
        assert (inferred.way.name, inferred.way.bound, inferred.walked.variants) == ("fp32", "exact", ["fp32"])


async def test_every_router_hears_of_it_with_its_next_report(monitor, family):
    one = await started(monitor, family, id="one")
    two = await started(monitor, family, id="two")
    await alarmed(one)
    await two.watch.report()
    under_load(two)
    assert point_names(await traffic(two, 20)) == {"careful"}


async def test_two_routers_raise_it_together(monitor, family):
    routers = [await started(monitor, family, id=name) for name in ("one", "two")]
    for router in routers:
        under_load(router)
        await traffic(router, 16)
        await router.watch.report()
    assert state_of(routers[1], "cheap").status == "revoked"
    assert not alarms(4, 16, 0.05, 0.01), "neither of them alone had seen enough"


async def test_a_router_that_starts_later_never_uses_it(monitor, family):
    await alarmed(await started(monitor, family))
    router = make_router([family], send=monitor.sync, share=1.0, id="late")
    under_load(router)
    asking = asyncio.ensure_future(ask(router, ["the fox"], max_disagreement=0.05))
    await asyncio.sleep(0.01)
    assert not asking.done(), "it waits for the first word of the monitor"
    await router.watch.report()
    assert (await asking).way.name == "careful"


async def test_the_alarm_survives_the_monitor(monitor, family):
    await alarmed(await started(monitor, family))
    await monitor.close()
    async with monitoring([family]) as again:
        router = await started(again, family)
        under_load(router)
        assert point_names(await traffic(router, 10)) == {"careful"}


async def test_a_revoked_point_goes_on_in_the_shadow_for_a_new_certificate(monitor, family):
    wire = Wire(monitor)
    router = await started(wire, family)
    await alarmed(router)
    before = state_of(router, "cheap")
    wire.reports.clear()
    await traffic(router, 40)
    await router.watch.report()
    by_point = {name: [pair for pair in wire.pairs() if pair.point == name] for name in ("careful", "cheap")}
    assert {pair.served for pair in by_point["careful"]} == {True}
    assert {pair.served for pair in by_point["cheap"]} == {False}
    assert len(by_point["careful"]) == len(by_point["cheap"]) == 40
    assert sum(pair.differs for pair in by_point["cheap"]) == 10
    # The evidence that counts is what it was at the alarm.
    after = state_of(router, "cheap")
    assert (after.shadows, after.disagreements) == (before.shadows, before.disagreements)


async def test_a_class_that_it_never_served_tells_nothing_about_it(monitor, family):
    wire = Wire(monitor)
    router = await started(wire, family)
    await alarmed(router)
    wire.reports.clear()
    await traffic(router, 20, 0.01)
    await traffic(router, 20, "exact")
    await router.watch.report()
    assert {pair.point for pair in wire.pairs()} == {"careful"}


async def test_the_reference_need_not_be_asked_twice(tmp_path):
    """Where it answers itself, its answer is the truth for what is revoked."""
    only = make_fake_family(tmp_path / "only", variants=CORRUPT, points=[CHEAP])
    async with monitoring([only]) as monitor:
        wire = Wire(monitor)
        router = await started(wire, only)
        await alarmed(router)
        wire.reports.clear()
        slots_of(router, "fake", "fp32").batches.clear()
        await traffic(router, 40)
        assert sum(slots_of(router, "fake", "fp32").batches) == 40
        await router.watch.report()
        assert {(pair.point, pair.served) for pair in wire.pairs()} == {("cheap", False)}
        assert sum(pair.differs for pair in wire.pairs()) == 10


async def test_a_new_certificate_is_taken_up(monitor, family):
    router = await started(monitor, family)
    await alarmed(router)
    again = renewed(CHEAP)
    give_points(family.directory, [CAREFUL, again])
    await router.watch.report()
    assert state_of(router, "cheap").fingerprint == fingerprint(again)
    under_load(router)
    [inferred] = await traffic(router, 1)
    assert (inferred.way.name, inferred.way.bound) == ("cheap", again.certificate.upper_bound)


async def test_recertified_from_its_own_pairs(tmp_path):
    """An alarm, the variant repaired, pairs from the shadow, `fettle recertify`: it answers again."""
    variants = [*HONEST[:2], FakeVariant("cheap", corrupt_every=4)]
    family = make_fake_family(tmp_path / "family", variants=variants, points=[CHEAP])
    async with monitoring([family]) as monitor:
        router = await started(monitor, family)
        await alarmed(router)
        engine = slots_of(router, "fake", "cheap").engine
        assert isinstance(engine, FakeEngine)
        engine.parameters = FakeParameters()
        await traffic(router, 400, seed=2)
        await router.watch.report()
        made = await asyncio.to_thread(recertify, family.directory, name="fake", point="cheap")
        assert made.since_alarm
        await router.watch.report()
        [inferred] = await traffic(router, 1)
        assert inferred.way.name == "cheap"
        assert inferred.way.bound == made.point.certificate.upper_bound


# Reports.


async def test_a_monitor_that_fails_for_a_while_loses_nothing(monitor, family):
    wire = Wire(monitor)
    router = await started(wire, family)
    wire.before = [ConnectionError("starting"), TimeoutError(), ConnectionError("still starting")]
    for seed in range(3):
        await traffic(router, 30, seed=seed)
        with pytest.raises((ConnectionError, TimeoutError)):
            await router.watch.report()
    await traffic(router, 30, seed=3)
    await router.watch.report()
    assert state_of(router, "careful").shadows == 120
    # And so with what was seen without labels.
    [seen] = wire.reports[-1].places
    assert sum(map(sum, seen.answered)) == 120
    assert sum(seen.scores) == 120
    await router.watch.report()
    assert (wire.reports[-1].pairs, wire.reports[-1].places) == ((), ())


async def test_a_reply_that_is_lost_counts_no_pair_twice(monitor, family):
    wire = Wire(monitor)
    router = await started(wire, family)
    wire.after = [TimeoutError(), TimeoutError()]
    await traffic(router, 30)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await router.watch.report()
    await router.watch.report()
    assert state_of(router, "careful").shadows == 30


async def test_pairs_that_come_while_a_report_is_under_way_go_with_the_next(monitor, family):
    release = asyncio.Event()

    async def slow(report: RouterReport) -> MonitorReply:
        reply = await monitor.sync(report)
        await release.wait()
        return reply

    release.set()
    router = make_router([family], send=slow, share=1.0)
    await router.watch.report()
    await traffic(router, 20)
    release.clear()
    reporting = asyncio.ensure_future(router.watch.report())
    await asyncio.sleep(0)
    await traffic(router, 15, seed=2)
    release.set()
    await reporting
    await router.watch.report()
    assert state_of(router, "careful").shadows == 35


async def test_many_pairs_are_reported_in_portions(monitor, family, monkeypatch):
    monkeypatch.setattr(watch, "MOST_PAIRS_REPORTED", 20)
    wire = Wire(monitor)
    router = await started(wire, family)
    await traffic(router, 50)
    for shadows in (20, 40, 50, 50):
        await router.watch.report()
        assert state_of(router, "careful").shadows == shadows
    assert len({pair.id for pair in wire.pairs()}) == 50


async def test_it_reports_and_shifts_gears_by_itself(monitor, family, monkeypatch):
    monkeypatch.setattr(watch, "REPORT_EVERY_S", 0.005)
    wire = Wire(monitor, before=[ConnectionError("not yet")])
    router = make_router([family], send=wire.send, share=1.0)
    ticks: list[float] = []
    monkeypatch.setattr(router.families["fake"].gearbox, "tick", ticks.append)
    running = asyncio.ensure_future(router.watch.run())
    under_load(router)
    found = await traffic(router, 60)
    assert point_names(found) == {"cheap"}
    async with asyncio.timeout(PATIENCE_S):
        while state_of(router, "cheap").status != "revoked":
            await asyncio.sleep(0.005)
    assert ticks
    assert ticks == sorted(ticks)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await asyncio.sleep(0)
    count = len(wire.reports)
    await asyncio.sleep(0.02)
    assert len(wire.reports) == count, "and stops when it is cancelled"


async def test_a_router_whose_monitor_never_comes_answers_after_a_while(family, monkeypatch, caplog):
    monkeypatch.setattr(watch, "REPORT_EVERY_S", 0.002)
    monkeypatch.setattr(watch, "INFORMED_WITHIN_S", 0.03)

    async def dead(report: RouterReport) -> MonitorReply:
        raise ConnectionError("nobody there")

    router = make_router([family], send=dead, share=1.0)
    running = asyncio.ensure_future(router.watch.run())
    begun = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        inferred = await ask(router, ["the fox"], max_disagreement=0.05)
    assert time.monotonic() - begun >= 0.03
    assert inferred.way.name == "careful"
    running.cancel()


# What is shown.


async def test_quality_and_stats_show_the_evidence(monitor, family):
    router = await started(monitor, family)
    await alarmed(router)
    async with client_of(build_api(router)) as client:
        reply = schemas.QualityReply.model_validate((await client.get("/quality")).json())
        [shown] = reply.families
        by_point = {point.point: point for point in shown.points}
        cheap = by_point["cheap"]
        assert (cheap.status, cheap.shadows, cheap.disagreements) == ("revoked", 60, 15)
        assert cheap.evidence >= cheap.alarm_at == pytest.approx(100)
        assert cheap.revoked_at is not None
        assert abs(cheap.revoked_at - time.time()) < 3600
        assert (cheap.alpha, cheap.upper_bound) == (0.05, CHEAP.certificate.upper_bound)
        careful = by_point["careful"]
        assert (careful.status, careful.revoked_at) == ("watched", None)
        live = schemas.Live.model_validate((await client.get("/stats")).json())
        assert live.shadow_share == 1.0
        assert live.routers == 1
        assert [point.point for point in live.quality] == [point.point for point in shown.points]


async def test_a_stricter_monitor_waits_longer(family):
    async with monitoring([family], MonitorConfig(delta=1e-30)) as monitor:
        router = await started(monitor, family)
        under_load(router)
        await traffic(router, 60)
        await router.watch.report()
        assert state_of(router, "cheap").status == "watched"


async def test_two_families_are_watched_apart(tmp_path):
    made = [
        make_fake_family(tmp_path / name, name=name, variants=variants, points=[CHEAP])
        for name, variants in (("good", HONEST), ("bad", CORRUPT))
    ]
    async with monitoring(made) as monitor:
        router = await started(monitor, *made)
        chance = random.Random(5)
        texts = [text(chance) for _ in range(60)]
        for name in ("good", "bad"):
            await asyncio.gather(*(ask(router, [each], model=name, max_disagreement=0.05) for each in texts))
        await compared(router)
        await router.watch.report()
        states = {state.family: (state.status, state.disagreements) for state in router.watch.states}
        assert states == {"good": ("watched", 0), "bad": ("revoked", 15)}
        assert (await ask(router, ["the fox"], model="good", max_disagreement=0.05)).way.name == "cheap"
        assert (await ask(router, ["the fox"], model="bad", max_disagreement=0.05)).way.name == "fp32"
