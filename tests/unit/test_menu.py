"""What may answer at which level, and what a family takes over from the monitor."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments.served import ServedFamily
from fettle.config import FamilyConfig
from fettle.errors import FamilyError, RequestError
from fettle.family import Family
from fettle.manifest import OperatingPoint
from fettle.menu import EXACT, Menu
from fettle.points import NEVER, fingerprint
from fettle.quality import PointState
from tests.fakes import FakeVariant, change_json, give_points, make_fake_family, make_point, make_step, renewed
from tests.inprocess import make_router

VARIANTS = [FakeVariant("fp32"), FakeVariant("int8"), FakeVariant("exits", stages=3)]
ONE = make_point("one", 0.01, make_step("exits", 0.5, 0.5, 0.5), make_step("fp32"), cost=5.0)
TWO = make_point("two", 0.02, make_step("int8", 0.5), make_step("fp32"), cost=3.0)
# Costs more than the stricter TWO.
THREE = make_point("three", 0.03, make_step("exits", NEVER, 0.2, 0.0), cost=4.0)
FIVE = make_point("five", 0.05, make_step("int8"), cost=1.0)
POINTS = [FIVE, THREE, ONE, TWO]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_fake_family(tmp_path / "family", variants=VARIANTS, points=POINTS)


def menu(family: Family, served: list[str] | None = None, revoked: list[OperatingPoint] | None = None) -> Menu:
    return Menu(family, served or list(family.variants), [fingerprint(point) for point in revoked or []])


def names(menu: Menu, tolerance: float, *, degraded: bool = False) -> list[str]:
    return [way.name for way in menu.gears(tolerance, degraded=degraded)]


@pytest.mark.parametrize(
    ("tolerance", "gears"),
    [
        (0.0, ["fp32"]),
        (0.009, ["fp32"]),
        (0.01, ["one"]),
        (0.02, ["one", "two"]),
        (0.04, ["one", "two"]),
        (0.05, ["one", "two", "five"]),
        (1.0, ["one", "two", "five"]),
    ],
)
def test_a_class_may_use_what_is_certified_at_it_or_stricter(family, tolerance, gears):
    assert names(menu(family), tolerance) == gears


def test_the_reference_promises_exactness_and_points_their_bound(family):
    found = menu(family)
    [reference] = found.gears(0.0)
    assert (reference.bound, reference.alpha, reference.point) == (EXACT, 0.0, None)
    one = found.gears(0.01)[0]
    assert (one.bound, one.alpha, one.fingerprint) == (ONE.certificate.upper_bound, 0.01, fingerprint(ONE))


def test_degraded_adds_the_cheaper_points_of_weaker_levels(family):
    assert names(menu(family), 0.01, degraded=True) == ["one", "two", "five"]
    assert names(menu(family), 0.0, degraded=True) == ["fp32", "one", "two", "five"]
    assert names(menu(family), 1.0, degraded=True) == ["one", "two", "five"]


def test_a_point_that_costs_no_less_than_a_stricter_one_is_left_out(family):
    found = menu(family)
    assert found.levels == [0.01, 0.02, 0.05]
    assert found.level(0.03) == 0.02


def test_two_points_of_one_level_leave_the_cheaper(tmp_path):
    other = make_point("other", 0.01, make_step("int8", 0.9), make_step("fp32"), cost=4.5)
    family = make_fake_family(tmp_path / "family", variants=VARIANTS, points=[*POINTS, other])
    assert names(menu(family), 0.01) == ["other"]


@pytest.mark.parametrize(
    ("tolerance", "level"), [(0.0, 0.0), (0.0099, 0.0), (0.01, 0.01), (0.049, 0.02), (0.05, 0.05), (1.0, 0.05)]
)
def test_a_tolerance_amounts_to_the_weakest_level_within_it(family, tolerance, level):
    assert menu(family).level(tolerance) == level


def test_points_whose_variants_are_not_all_served_are_not_there(family):
    found = menu(family, ["fp32", "exits"])
    assert names(found, 1.0) == ["one", "three"]
    assert found.revoked == []


def test_a_revoked_point_is_not_used_and_what_it_hid_is(family):
    found = menu(family, revoked=[TWO])
    assert names(found, 1.0) == ["one", "three", "five"]
    assert [way.name for way in found.revoked] == ["two"]
    assert names(menu(family, revoked=[ONE]), 0.01) == ["fp32"]
    assert names(menu(family, revoked=POINTS), 1.0) == ["fp32"]


def test_without_the_reference_what_is_not_certified_is_refused(family):
    found = menu(family, ["int8"])
    assert names(found, 0.05) == ["five"]
    with pytest.raises(RequestError, match="the reference 'fp32' is not served") as refused:
        found.gears(0.04)
    assert refused.value.param == "max_disagreement"
    with pytest.raises(RequestError):
        menu(family, ["int8"], [FIVE]).gears(0.05)


def test_a_pinned_variant_promises_nothing_unless_it_is_the_reference(family):
    found = menu(family)
    for name, stages in (("int8", 1), ("exits", 3)):
        way = found.pinned(name)
        assert (way.bound, way.alpha, way.point, way.variants) == (None, 1.0, None, (name,))
        # All the way to the last stage.
        [stretch] = way.stretches
        assert [gate.threshold for gate in stretch.step.gates] == [NEVER] * (stages - 1) + [0.0]
        assert (stretch.gates, stretch.share) == (None, 1.0)
    assert found.pinned("fp32").bound == EXACT


def test_what_is_expected_of_a_step_comes_from_test(family):
    first, second = menu(family).gears(0.01)[0].stretches
    # Half leave at each gate, and every stage costs the same.
    assert (first.reach, second.reach) == (1.0, 0.125)
    assert first.share == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert second.share == 1.0
    assert first.gates is not None
    thresholds, temperatures = first.gates
    assert thresholds.tolist() == [0.5, 0.5]
    assert temperatures.dtype == thresholds.dtype == np.float32
    assert second.gates is None


def test_a_point_that_was_not_tried_on_test_is_taken_to_go_on_half_the_time(tmp_path):
    untried = ONE.model_copy(update={"test": None})
    family = make_fake_family(tmp_path / "family", variants=VARIANTS, points=[untried])
    assert [(each.reach, each.share) for each in menu(family).gears(0.01)[0].stretches] == [(1.0, 1.0), (0.5, 1.0)]


def test_a_step_whose_early_gates_take_nothing_has_no_exits(tmp_path):
    closed = make_point("closed", 0.01, make_step("exits", NEVER, NEVER, 0.0))
    family = make_fake_family(tmp_path / "family", variants=VARIANTS, points=[closed])
    assert menu(family).gears(0.01)[0].stretches[0].gates is None


@pytest.mark.parametrize("step", [make_step("exits", 0.5), make_step("int4")], ids=["gates", "variant"])
def test_a_point_that_does_not_fit_the_variants_is_refused(tmp_path, step):
    family = make_fake_family(tmp_path / "family", variants=VARIANTS, points=[make_point("bad", 0.01, step)])
    with pytest.raises(FamilyError):
        menu(family)


# What is learnt from the monitor.


@pytest.fixture
def served(family: Family) -> ServedFamily:
    return make_router([family]).families["fake"]


def state(point: OperatingPoint, status: str = "watched", family: str = "fake") -> PointState:
    found = point.certificate
    return PointState(
        family=family,
        point=point.id,
        fingerprint=fingerprint(point),
        alpha=found.alpha,
        upper_bound=found.upper_bound,
        certified_rows=found.rows,
        certified_errors=found.errors,
        shadows=100,
        disagreements=10,
        evidence=1.0,
        alarm_at=100.0,
        status=status,  # type: ignore[arg-type]
        revoked_at=1.0 if status == "revoked" else None,
        drift=None,
    )


WATCHED = [state(point) for point in POINTS]


def test_what_is_revoked_is_not_used_any_more(served):
    served.learn([*WATCHED[:3], state(TWO, "revoked")])
    assert names(served.menu, 0.02) == ["one"]
    served.learn([state(ONE, "revoked")])
    assert names(served.menu, 0.02) == ["fp32"]


@pytest.mark.parametrize("later", [[], WATCHED, WATCHED[:1]], ids=["nothing", "watched", "others"])
def test_a_revocation_stands_whatever_is_said_later(served, later):
    served.learn([state(TWO, "revoked")])
    served.learn(later)
    assert names(served.menu, 0.02) == ["one"]


def test_a_new_certificate_is_read_from_the_disk_and_ends_the_revocation(served, family):
    served.learn([state(TWO, "revoked")])
    again = renewed(TWO)
    give_points(family.directory, [FIVE, THREE, ONE, again])
    served.learn([*WATCHED[:3], state(again)])
    two = served.menu.gears(0.02)[1]
    assert (two.name, two.bound, two.fingerprint) == ("two", again.certificate.upper_bound, fingerprint(again))
    assert served.menu.revoked == []
    # The old certificate stays revoked, should the old file come back.
    give_points(family.directory, POINTS)
    served.learn(WATCHED)
    assert names(served.menu, 0.02) == ["one"]


def test_a_new_certificate_can_be_revoked_too(served, family):
    again = renewed(TWO)
    give_points(family.directory, [ONE, again])
    served.learn([state(ONE), state(again, "revoked")])
    assert names(served.menu, 0.02) == ["one"]


def test_what_is_said_of_other_families_is_not_meant(served):
    served.learn([replace(state(TWO, "revoked"), family="other")])
    assert names(served.menu, 0.02) == ["one", "two"]


def test_what_changes_nothing_leaves_the_gears_where_they_are(served):
    before = served.menu, served.gearbox
    served.learn([])
    served.learn(WATCHED)
    assert (served.menu, served.gearbox) == before
    served.learn([state(TWO, "revoked")])
    after = served.menu, served.gearbox
    assert after != before
    served.learn([state(TWO, "revoked"), *WATCHED])
    assert (served.menu, served.gearbox) == after


def test_a_certificate_that_is_not_on_the_disk_yet_changes_nothing(served):
    before = served.menu, served.gearbox
    for _ in range(3):
        served.learn([state(renewed(TWO))])
    assert (served.menu, served.gearbox) == before


def test_a_family_that_cannot_be_read_stays_as_it_was(served, family, caplog):
    (family.directory / "family.json").write_text("{")
    with caplog.at_level(logging.WARNING, "ray.serve.fettle"):
        served.learn([state(renewed(TWO)), state(ONE, "revoked")])
    assert "cannot be read, the old one stays" in caplog.text
    assert names(served.menu, 0.02) == ["two"], "and what is revoked is revoked all the same"


def test_a_family_that_was_rebuilt_is_served_as_it_was(served, family, tmp_path, caplog):
    other = make_fake_family(
        tmp_path / "other", variants=[*VARIANTS[:2], FakeVariant("exits", stages=3, tokens_read=9)]
    )
    (family.directory / "variants").rename(tmp_path / "old")
    (other.directory / "variants").rename(family.directory / "variants")
    change_json(other.directory / "family.json", points=[renewed(TWO).model_dump(mode="json")])
    (other.directory / "family.json").rename(family.directory / "family.json")
    with caplog.at_level(logging.WARNING, "ray.serve.fettle"):
        served.learn([state(renewed(TWO))])
    assert "was rebuilt; restart the service" in caplog.text
    assert names(served.menu, 0.02) == ["one", "two"]


# Defaults, and what is shown.


def default_of(family: Family, **settings: object) -> tuple[str, str | None]:
    own = FamilyConfig.model_validate({"path": str(family.directory), **settings})
    found = make_router([family], settings={"fake": own}).families["fake"].default
    return found.asked, found.variant


def test_the_default_is_the_configured_class(family):
    assert default_of(family) == ("0.01", None)
    assert default_of(family, max_disagreement=0.05) == ("0.05", None)
    assert default_of(family, max_disagreement="exact") == default_of(family, max_disagreement=0) == ("exact", None)
    assert default_of(family, default="int8") == ("pinned", "int8")


def test_a_family_without_certificates_answers_with_its_default_variant(tmp_path):
    plain = make_fake_family(tmp_path / "plain", variants=VARIANTS, default="int8")
    assert default_of(plain) == ("pinned", "int8")


def test_a_class_is_counted_by_the_level_that_it_amounts_to(served):
    def name(tolerance: float) -> str:
        return served.level_name(replace(served.default, tolerance=tolerance))

    assert [name(share) for share in (0.0, 0.005, 0.01, 0.03, 0.5)] == ["exact", "exact", "1 %", "2 %", "5 %"]
    assert served.level_name(replace(served.default, variant="int8")) == "pinned"


def test_the_gauges_name_the_gears_of_each_class(served):
    gauges = served.gauges()
    assert [(each.name, each.gears, each.gear) for each in gauges.classes] == [
        ("exact", ["fp32"], 0),
        ("1 %", ["one"], 0),
        ("2 %", ["one", "two"], 0),
        ("5 %", ["one", "two", "five"], 0),
    ]
    assert [(each.id, each.stages, each.replicas) for each in gauges.variants] == [
        ("fp32", 1, 1),
        ("int8", 1, 1),
        ("exits", 3, 1),
    ]
    assert [each.steps for each in gauges.points if each.id == "one"] == [[("exits", 3), ("fp32", 1)]]
    served.learn([state(TWO, "revoked")])
    assert [each.name for each in served.gauges().classes] == ["exact", "1 %", "3 %", "5 %"]


def test_without_the_reference_exact_has_no_gear(family):
    settings = {"fake": FamilyConfig(path=str(family.directory), variants=["int8"])}
    served = make_router([family], settings=settings).families["fake"]
    assert [(each.name, each.gears) for each in served.gauges().classes] == [("exact", []), ("5 %", ["five"])]
