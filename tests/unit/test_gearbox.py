"""The gears of a family's classes: each by the predicted drain time along the way that it uses now."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.batcher import Batcher
from deployments.served import ServedFamily
from fettle.config import GearConfig
from tests.fakes import FakeVariant, make_fake_family, make_point, make_step
from tests.inprocess import make_router

# At 1 % everything goes through `exits` and a quarter of it on to the reference; at 5 % all is `cheap`.
ONE = make_point("one", 0.01, make_step("exits", 0.5, 0.5), make_step("fp32"), cost=5.0)
FIVE = make_point("five", 0.05, make_step("cheap"), cost=1.0)
VARIANTS = [FakeVariant("fp32"), FakeVariant("exits", stages=2), FakeVariant("cheap")]


@pytest.fixture
def backlogs(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Seconds by batcher."""
    told: dict[int, float] = {}
    monkeypatch.setattr(Batcher, "backlog_s", property(lambda batcher: told.get(id(batcher), 0.0)))
    return told


@pytest.fixture
def served(tmp_path: Path) -> ServedFamily:
    family = make_fake_family(tmp_path / "family", variants=VARIANTS, points=[ONE, FIVE])
    return make_router([family], gears=GearConfig(objective_ms=100.0, dwell_s=3.0)).families["fake"]


def tick(served: ServedFamily, seconds: float, start: float) -> float:
    """Readings for so long; the time afterwards."""
    now = start
    for _ in range(round(seconds * 10)):
        now += 0.1
        served.gearbox.tick(now)
    return now


def test_the_pressure_is_the_drain_time_along_the_way_over_the_objective(served, backlogs):
    backlogs[id(served.batchers["exits"])] = 0.03
    backlogs[id(served.batchers["fp32"])] = 0.04
    backlogs[id(served.batchers["cheap"])] = 0.02
    tick(served, 10, 0.0)
    # 0.03 and a quarter of 0.04, over 0.1. Both classes rest in their first gear, which is the same point.
    assert served.gearbox.gear(0.01).pressure == pytest.approx(0.4)
    assert served.gearbox.gear(0.05).pressure == pytest.approx(0.4)


def test_a_class_shifts_to_its_own_cheaper_points_and_back(served, backlogs):
    backlogs[id(served.batchers["exits"])] = 0.2
    now = tick(served, 2, 0.0)
    assert served.gearbox.number(0.05, degraded=False) == 1
    assert served.gearbox.number(0.9, degraded=False) == 1, "a tolerance has the gear of the level that it amounts to"
    assert served.gearbox.number(0.01, degraded=False) == 0, "it has no other point"
    assert served.gearbox.number(0.0, degraded=False) == 0
    # The way that it uses now is empty, but the one that it came from is still full.
    now = tick(served, 30, now)
    assert served.gearbox.number(0.05, degraded=False) == 1
    backlogs.clear()
    tick(served, 5, now)
    assert served.gearbox.number(0.05, degraded=False) == 0


def test_who_allows_degraded_answers_has_gears_of_their_own(served, backlogs):
    assert served.gearbox.number(0.01, degraded=True) == 0
    backlogs[id(served.batchers["exits"])] = 0.2
    tick(served, 2, 0.0)
    assert served.gearbox.number(0.01, degraded=True) == 1
    assert served.gearbox.number(0.01, degraded=False) == 0


def test_what_the_classes_do_not_use_is_no_pressure(served, backlogs):
    backlogs[id(served.batchers["cheap"])] = 5.0
    tick(served, 2, 0.0)
    assert served.gearbox.gear(0.05).pressure == 0.0
    assert served.gearbox.gear(0.05).number == 0


def test_below_the_lower_mark_there_is_room_for_gaps(served, backlogs):
    assert served.is_calm()
    backlogs[id(served.batchers["cheap"])] = 0.029
    assert served.is_calm()
    backlogs[id(served.batchers["cheap"])] = 0.031
    assert not served.is_calm()
