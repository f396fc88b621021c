"""A rollout at a router and at the monitor: who answers, what is counted, and what survives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api import build_api
from deployments.reports import TrialOrder, TrialReport
from deployments.rollouts import Rollout
from deployments.router import Router
from deployments.trial import Trial
from deployments.versions import Version, versions_of
from fettle.config import FamilyConfig, RolloutConfig, ServeConfig
from fettle.errors import QualityError, UsageError
from fettle.rollout import Compared, Side, Tally
from tests.fakes import FakeVariant, embed_task, make_fake_family, make_point, make_step, token_id
from tests.inprocess import client_of, make_router, slots_of

pytestmark = pytest.mark.anyio

POINTS = [make_point("within-0.01", 0.01, make_step("int8"), cost=2.0)]
ROLLOUT = {"steps": [0.25, 0.5], "hold_s": 0, "min_requests": 10, "min_compared": 0}


@dataclass
class Running:
    """Two versions at one router, and the client that asks."""

    router: Router
    trial: Trial
    http: httpx.AsyncClient

    async def ask(self, text: str = "the quick fox", **headers: str) -> dict[str, Any]:
        response = await self.http.post("/classify", json={"model": "sections", "input": text}, headers=headers)
        assert response.status_code == 200, response.text
        said: dict[str, Any] = response.json()["fettle"]
        return said


def make_config(where: Path, **changes: Any) -> ServeConfig:
    """An old version, and a new one whose cheap variant differs as told."""
    rollout = {key: changes.pop(key) for key in list(changes) if key in RolloutConfig.model_fields}
    for name, own in (("old", {}), ("new", {"ms_per_token": 0.001, **changes})):
        variants = [FakeVariant("fp32"), FakeVariant("int8", **own)]
        make_fake_family(where / name, name="sections", variants=variants, points=POINTS)
    made = RolloutConfig(path=str(where / "new"), **{**ROLLOUT, **rollout})
    return ServeConfig(families=[FamilyConfig(path=str(where / "old"), rollout=made)])


def make_running(config: ServeConfig, share: float = 1.0) -> Running:
    old, new = versions_of(config)
    router = make_router([old.family])
    beside = make_router([new.family]).families["sections"]
    beside.name = new.name
    assert old.settings.rollout is not None
    trial = Trial(router.families["sections"], beside, old.settings.rollout)
    trial.obey(TrialOrder(new.name, share, 0, "running"))
    router.families = {"sections": router.families["sections"], new.name: beside}
    router.trials = {"sections": trial}
    return Running(router, trial, client_of(build_api(router)))


def rollout_of(config: ServeConfig, **options: Any) -> Rollout:
    return Rollout(*versions_of(config), None, **options)


async def settled(trial: Trial) -> None:
    while trial._comparing:
        await asyncio.gather(*trial._comparing)


async def test_the_share_goes_to_the_new_version_and_a_session_to_one(tmp_path: Path):
    running = make_running(make_config(tmp_path), share=0.5)
    seen = {(await running.ask())["family"] for _ in range(40)}
    assert seen == {"sections", running.trial.new.name}
    by_session = {
        name: {(await running.ask(**{"x-fettle-session": name}))["family"] for _ in range(5)} for name in "abcdefgh"
    }
    assert all(len(families) == 1 for families in by_session.values())
    at_new = {name for name, families in by_session.items() if families != {"sections"}}
    running.trial.share = 0.9
    assert at_new <= {name for name in by_session if running.trial.draw(name)}, "who came over stays"


async def test_pinned_requests_take_no_part(tmp_path: Path):
    running = make_running(make_config(tmp_path))
    reply = await running.http.post("/classify", json={"model": "sections:int8", "input": "fox"})
    assert reply.json()["model"] == "sections:int8"
    beside = await running.http.post("/classify", json={"model": f"{running.trial.new.name}:int8", "input": "fox"})
    assert beside.status_code == 200
    assert running.trial.tallies == {}


async def test_what_fails_at_the_new_version_the_old_one_answers(tmp_path: Path):
    running = make_running(make_config(tmp_path, fail_on_token=token_id("poison")), share=0.9999)
    assert (await running.ask("the poison"))["family"] == "sections"
    new = running.trial.tallies[0].new
    assert (new.requests, new.failed) == (1, 1)


async def test_what_does_not_run_or_has_no_room_gets_nothing(tmp_path: Path):
    running = make_running(make_config(tmp_path))
    for variant in running.trial.new.batchers:
        slots_of(running.router, running.trial.new.name, variant).replicas = 0
    assert (await running.ask())["family"] == "sections"
    assert not running.trial.report().ready
    assert (await running.http.get("/ready")).status_code == 200, "the service is, since the old version answers"


async def test_a_request_that_names_no_model_means_the_family_and_not_its_new_version(tmp_path: Path):
    running = make_running(make_config(tmp_path))
    reply = await running.http.post("/classify", json={"input": "fox"})
    assert reply.json()["fettle"]["family"] == running.trial.new.name
    running.trial.share = 0.0
    reply = await running.http.post("/classify", json={"input": "fox"})
    assert reply.json()["fettle"]["family"] == "sections"


async def test_answers_are_compared_with_the_old_reference(tmp_path: Path):
    running = make_running(make_config(tmp_path, corrupt_every=2, shadow=1.0), share=0.9999)
    for number in range(10):
        await running.ask(f"word{number} fox")
    await settled(running.trial)
    tally = running.trial.tallies[0]
    assert tally.compared == Compared(rows=10, differing=5)
    assert tally.promised == {0.01: tally.compared}


def test_slow_is_what_exceeds_the_old_90th_percentile_by_the_factor(tmp_path: Path):
    trial = make_running(make_config(tmp_path, slower=2.0), share=0.5).trial
    for ms in range(1, 101):
        trial.answered(trial.old, float(ms))
    before = trial.tallies[0].old.slow
    trial.answered(trial.old, 95.0)
    trial.answered(trial.new, 95.0)
    trial.answered(trial.new, 190.0)
    assert trial.tallies[0].old.slow == before + 1
    assert trial.tallies[0].new == Side(requests=2, slow=1)


def report(config: ServeConfig, *tallies: Tally, ready: bool = True) -> TrialReport:
    return TrialReport(versions_of(config)[1].name, ready, True, dict(enumerate(tallies)))


async def test_the_monitor_adds_up_and_a_report_that_comes_twice_counts_once(tmp_path: Path):
    config = make_config(tmp_path)
    rollout = rollout_of(config, routers=2)
    for _ in range(3):
        rollout.take("a", report(config))
        rollout.take("b", report(config, ready=False))
    assert rollout.order().share == 0.0, "one router has no replicas yet"
    rollout.take("b", report(config))
    assert rollout.order().share == 0.25
    for _ in range(3):
        rollout.take("a", report(config, Tally(new=Side(requests=4))))
    assert rollout.order().share == 0.25
    rollout.take("b", report(config, Tally(new=Side(requests=6))))
    assert rollout.order().share == 0.5
    assert rollout.view().tallies[0].new.requests == 10


async def test_where_it_stands_survives_the_monitor(tmp_path: Path):
    config = make_config(tmp_path)
    rollout = rollout_of(config)
    rollout.take("a", report(config))
    rollout.take("a", report(config, Tally(new=Side(requests=50, failed=9), old=Side(requests=150))))
    assert rollout.position.status == "rolled back"
    again = rollout_of(config)
    assert again.position == rollout.position
    again.take("a", report(config))
    assert again.order().share == 0.0
    family = config.families[0]
    assert family.rollout is not None
    other = family.rollout.model_copy(update={"attempt": "2"})
    anew = rollout_of(ServeConfig(families=[family.model_copy(update={"rollout": other})]))
    assert anew.position.status == "starting"


async def test_replicas_that_do_not_start_end_it(tmp_path: Path):
    config = make_config(tmp_path)
    rollout = rollout_of(config, failure=lambda version: f"{version.name} is broken")
    rollout.take("a", report(config, ready=False))
    assert (rollout.position.status, rollout.order().share) == ("rolled back", 0.0)
    assert "is broken" in rollout.position.reason


async def test_an_operator_may_decide_once(tmp_path: Path):
    rollout = rollout_of(make_config(tmp_path))
    rollout.end(promote=True)
    assert rollout.order().share == 1.0
    with pytest.raises(UsageError, match="is over: promoted"):
        rollout.end(promote=False)


async def test_a_damaged_file_is_said_to_be_one(tmp_path: Path):
    config = make_config(tmp_path)
    rollout_of(config)
    [path] = (tmp_path / "old" / "quality").glob("*.rollout.json")
    path.write_text("{")
    with pytest.raises(QualityError, match="move it away"):
        rollout_of(config)


def test_what_is_no_new_version_is_refused(tmp_path: Path):
    config = make_config(tmp_path)
    old: Version = versions_of(config)[0]
    same = RolloutConfig(path=str(tmp_path / "old"))
    with pytest.raises(UsageError, match="is served already"):
        versions_of(ServeConfig(families=[old.settings.model_copy(update={"rollout": same})]))
    make_fake_family(tmp_path / "emb", name="sections", task=embed_task(8))
    other = RolloutConfig(path=str(tmp_path / "emb"))
    with pytest.raises(UsageError, match="another task"):
        versions_of(ServeConfig(families=[old.settings.model_copy(update={"rollout": other})]))
