"""`fettle recertify`: what it certifies, what it refuses, what it writes, and that asking often gains nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import fettle
from fettle import findings
from fettle.certificates import certify, holds, p_value
from fettle.cli import app
from fettle.errors import BusyError, QualityError, UsageError
from fettle.family import Family
from fettle.local import Bound
from fettle.manifest import Certificate, Gate, Level, OperatingPoint, SelfDisagreement, Step
from fettle.points import fingerprint
from fettle.quality import QualityStore, Tally, store_path
from fettle.recertify import certify_pairs, recertify, with_certificate
from fettle.store import locked
from optimize.report import write_report
from tests.fakes import FakeVariant, change_json, make_fake_family
from tests.report_family import make_report_family
from tests.unit.test_points import STEP, point
from tests.unit.test_quality import pairs

ID = "within-0.01-1"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = make_fake_family(tmp_path / "family", variants=[FakeVariant("original"), FakeVariant("cheap")])
    steps = [Step(variant="cheap", gates=[Gate(threshold=0.0)])]
    give(made.directory, [point(steps, 0.01, 1.0), point(steps, 0.05, 0.5)])
    return made.directory


def give(directory: Path, points: list[OperatingPoint], **changes: Any) -> None:
    levels = [
        *(Level(alpha=item.certificate.alpha, point=item.id) for item in points),
        Level(alpha=0.2, reason="none was found", rows_needed=14),
    ]
    change_json(
        directory / "family.json",
        points=[item.model_dump(mode="json") for item in points],
        levels=[level.model_dump(mode="json") for level in levels],
        **changes,
    )


def points_of(directory: Path) -> dict[str, OperatingPoint]:
    return {item.id: item for item in Family.open(directory).manifest.points}


def levels_of(directory: Path) -> dict[float, str | None]:
    return {level.alpha: level.point for level in Family.open(directory).manifest.levels}


def collect(
    directory: Path, errors: int, rows: int, *, name: str = "fake", served: bool = True, kept: Path | None = None
) -> None:
    """Pairs of the point at 1 %, as the monitor would keep them."""
    store = QualityStore(store_path(directory, name, kept))
    store.watch(name, points_of(directory).values())
    store.add(pairs(errors, rows, points_of(directory)[ID], served=served))
    store.close()


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["recertify", *map(str, arguments)])


# What is certified.


def test_pairs_that_suffice_make_a_certificate(directory: Path) -> None:
    collect(directory, 3, 2000)
    before = points_of(directory)[ID]
    made = recertify(directory, point=ID)
    found = points_of(directory)[ID].certificate
    assert made.point.certificate == found
    assert (made.before, made.since_alarm) == (before.certificate, False)
    assert (found.alpha, found.delta, found.errors, found.rows, found.source) == (0.01, 0.05, 3, 2000, "traffic")
    assert holds(found)
    assert found.p_value >= p_value(3, 2000, 0.01), "no better than the test for a fixed number"
    assert 3 / 2000 < found.upper_bound < 0.01
    assert fingerprint(made.point) != fingerprint(before)


def test_the_new_promise_is_the_one_that_is_given(directory: Path) -> None:
    collect(directory, 3, 2000)
    recertify(directory, point=ID)
    with fettle.load(directory) as local:
        (prediction,) = local.predict(["fox"], 0.01)
    assert prediction.bound == Bound(0.01, 0.05, points_of(directory)[ID].certificate.upper_bound)
    assert prediction.point == ID


def test_after_an_alarm_only_what_came_since_counts(directory: Path) -> None:
    collect(directory, 30, 300)
    collect(directory, 0, 2000)
    with pytest.raises(QualityError, match="0 of 0 pairs since the alarm differ"):
        recertify(directory)
    collect(directory, 1, 1500, served=False)
    made = recertify(directory)
    assert made.since_alarm
    assert made.point.id == ID, "the one that is revoked, unasked"
    assert (made.point.certificate.errors, made.point.certificate.rows) == (1, 1500)


def test_its_evidence_starts_anew(directory: Path) -> None:
    collect(directory, 30, 300)
    collect(directory, 1, 1500, served=False)
    recertify(directory)
    store = QualityStore(store_path(directory, "fake"))
    store.watch("fake", points_of(directory).values())
    states = {state.point: state for state in store.states("fake", points_of(directory).values())}
    assert (states[ID].status, states[ID].shadows) == ("watched", 0)
    assert store.tally(fingerprint(points_of(directory)[ID])) == Tally()
    with pytest.raises(QualityError, match="0 of 0 pairs"):
        recertify(directory, point=ID)


def test_other_places_of_the_evidence(directory: Path, tmp_path: Path) -> None:
    collect(directory, 0, 1000, name="other", kept=tmp_path / "kept")
    made = recertify(directory, point=ID, quality=tmp_path / "kept", name="other")
    assert made.point.certificate.rows == 1000


def test_a_certificate_for_the_worst_batching_becomes_one_for_the_batches_that_were_served() -> None:
    worst = point(STEP)
    certificate = worst.certificate.model_copy(update={"batchings": "worst of alone, mixed and full"})
    worst = worst.model_copy(update={"certificate": certificate})
    assert certify_pairs(point(STEP), Tally(served_rows=1000), 0.01).batchings == "any"
    assert certify_pairs(worst, Tally(served_rows=1000), 0.01).batchings == "as served"


# What is refused.


def test_too_few_pairs_say_how_many_it_takes(directory: Path) -> None:
    collect(directory, 1, 300)
    before = (directory / "family.json").read_bytes()
    with pytest.raises(QualityError) as caught:
        recertify(directory, point=ID)
    message = caught.value.message
    assert f"{ID} is not certified: 1 of 300 pairs differ" in message
    needed = int(message.split("it takes about ")[1].split(" ")[0].replace(",", ""))
    assert 700 < needed < 1500
    assert "for 1.00% at confidence 95%" in message
    assert (directory / "family.json").read_bytes() == before


def test_too_many_errors_say_what_they_would_allow(directory: Path) -> None:
    collect(directory, 30, 300)
    collect(directory, 60, 2000, served=False)
    with pytest.raises(QualityError, match=r"no number of pairs shows 1\.00%") as caught:
        recertify(directory)
    allowed = float(caught.value.message.rpartition("--max-disagreement ")[2])
    assert 0.03 < allowed < 0.06
    made = recertify(directory, max_disagreement=allowed)
    assert made.point.certificate.alpha == allowed


def test_nothing_collected(directory: Path) -> None:
    with pytest.raises(QualityError, match="no such file, so no pairs were collected"):
        recertify(directory, point=ID)


def test_the_point_must_be_clear(directory: Path) -> None:
    collect(directory, 0, 10)
    with pytest.raises(UsageError, match=r"no operating point 'within-0\.3'; it has within-0\.01-1, within-0\.05-0\.5"):
        recertify(directory, point="within-0.3")
    with pytest.raises(UsageError, match=r"--point: one of within-0\.01-1, within-0\.05-0\.5"):
        recertify(directory)


def test_a_family_without_points(tmp_path: Path) -> None:
    family = make_fake_family(tmp_path / "plain")
    QualityStore(store_path(family.directory, "fake")).close()
    with pytest.raises(UsageError, match="no operating points"):
        recertify(family.directory)


def test_no_level_below_what_the_reference_does_to_itself(directory: Path) -> None:
    collect(directory, 0, 10_000)
    give(
        directory,
        list(points_of(directory).values()),
        self_disagreement=SelfDisagreement(rows=100, changed=0.004, max_difference=0.1).model_dump(),
    )
    with pytest.raises(UsageError, match=r"disagrees with itself on 0\.40%"):
        recertify(directory, point=ID, max_disagreement=0.002)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0])
def test_levels_are_shares(directory: Path, level: float) -> None:
    collect(directory, 0, 10)
    with pytest.raises(UsageError, match="no share between 0 and 1"):
        recertify(directory, point=ID, max_disagreement=level)


def test_one_writer_at_a_time(directory: Path) -> None:
    collect(directory, 0, 1000)
    with locked(directory), pytest.raises(BusyError):
        recertify(directory, point=ID)


# The levels.


def test_a_looser_certificate_leaves_the_level_that_it_was_for(directory: Path) -> None:
    collect(directory, 20, 1500)
    recertify(directory, point=ID, max_disagreement=0.03)
    assert levels_of(directory) == {0.01: None, 0.03: ID, 0.05: "within-0.05-0.5", 0.2: None}
    (empty,) = (level for level in Family.open(directory).manifest.levels if level.alpha == 0.01)
    assert empty.reason == f"{ID} was certified anew on pairs from traffic, at 3.00%"


def test_a_level_keeps_the_point_that_it_has(directory: Path) -> None:
    collect(directory, 20, 1500)
    recertify(directory, point=ID, max_disagreement=0.05)
    assert levels_of(directory) == {0.01: None, 0.05: "within-0.05-0.5", 0.2: None}


def test_an_empty_level_is_filled(directory: Path) -> None:
    collect(directory, 20, 1500)
    recertify(directory, point=ID, max_disagreement=0.2)
    assert levels_of(directory) == {0.01: None, 0.05: "within-0.05-0.5", 0.2: ID}
    (filled,) = (level for level in Family.open(directory).manifest.levels if level.alpha == 0.2)
    assert (filled.reason, filled.rows_needed) == (None, None)


def test_a_stricter_certificate_serves_its_old_level_too(directory: Path) -> None:
    collect(directory, 0, 4000)
    recertify(directory, point=ID, max_disagreement=0.002)
    assert levels_of(directory) == {0.002: ID, 0.01: ID, 0.05: "within-0.05-0.5", 0.2: None}


def test_the_same_level_changes_no_level(directory: Path) -> None:
    manifest = Family.open(directory).manifest
    tested = findings.Tested(
        label="x", expected_cpu_ms=1, tuned_disagreement=0, certificate=manifest.points[0].certificate
    )
    levels = [manifest.levels[0].model_copy(update={"path": [tested]}), *manifest.levels[1:]]
    manifest = manifest.model_copy(update={"levels": levels})
    changed = with_certificate(manifest, ID, certify(0, 900, 0.01, 0.05))
    assert changed.levels == levels
    assert changed.points[1:] == manifest.points[1:]


# Asking often.


def test_who_asks_after_every_few_pairs_gains_nothing() -> None:
    """At just the level, over 20,000 pairs: asked every 100 pairs, and at the end at a stricter one."""
    tried, runs, delta = point(STEP, 0.05), 100, 0.05
    assert tried.certificate.delta == delta
    rng = np.random.default_rng(11)
    anytime = fixed = 0
    for _ in range(runs):
        errors = (rng.random(20_000) < 0.05).cumsum()
        moments = range(100, 20_001, 100)
        anytime += any(gets(tried, int(errors[rows - 1]), rows, 0.05) for rows in moments)
        fixed += any(p_value(int(errors[rows - 1]), rows, 0.05) <= delta / 2 for rows in moments)
        last = int(errors[-1])
        assert not gets(tried, last, 20_000, 0.04)
    assert anytime / runs <= delta
    assert fixed / runs > 2 * delta, "what would become of the test that optimize uses"


def gets(tried: OperatingPoint, errors: int, rows: int, alpha: float) -> bool:
    try:
        certify_pairs(tried, Tally(served_rows=rows, served_errors=errors), alpha)
    except QualityError:
        return False
    return True


# The command.


def test_the_command_says_what_is_certified(directory: Path) -> None:
    collect(directory, 3, 2000)
    done = command(directory, "--point", ID)
    assert done.exit_code == 0, done.stderr
    assert f"{ID}: at most 1.00% at confidence 95%; 3 errors in 2,000 rows of traffic, bound 0." in done.stdout
    assert "fettle report" in done.stderr


def test_the_command_for_machines(directory: Path, tmp_path: Path) -> None:
    collect(directory, 3, 2000, kept=tmp_path / "kept")
    arguments = ["--point", ID, "--max-disagreement", 0.02, "--directory", tmp_path / "kept", "--json"]
    done = command(directory, *arguments)
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["id"], shown["since_alarm"]) == (ID, False)
    assert shown["certificate"] == points_of(directory)[ID].certificate.model_dump()


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_refusal_is_one_line_and_1(directory: Path, arguments: list[str]) -> None:
    collect(directory, 1, 300)
    done = command(directory, "--point", ID, *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {ID} is not certified: 1 of 300 pairs differ")


def test_no_family_there(tmp_path: Path) -> None:
    done = command(tmp_path / "none")
    assert (done.exit_code, done.stdout) == (1, "")
    assert not (tmp_path / "none").exists()


# Who else reads certificates.


def test_files_of_before_still_load(directory: Path) -> None:
    path = directory / "family.json"
    content = json.loads(path.read_text())
    for item in content["points"]:
        del item["certificate"]["source"]
    path.write_text(json.dumps(content))
    assert points_of(directory)[ID].certificate.source == "calibration"


def test_show_and_report_say_where_the_rows_are_from(tmp_path: Path) -> None:
    family = make_report_family(tmp_path / "family")
    first = family.manifest.points[0]
    new = Certificate(
        alpha=0.01, delta=0.05, rows=12_345, errors=67, p_value=0.01, upper_bound=0.0091, source="traffic"
    )
    change_json(
        family.directory / "family.json", **with_certificate(family.manifest, first.id, new).model_dump(mode="json")
    )
    page = write_report(Family.open(family.directory)).read_text()
    assert "67 / 12,345 of traffic" in page
    assert "67 of 12,345 traffic rows" in page
    shown = CliRunner().invoke(app, ["show", str(family.directory)])
    assert shown.exit_code == 0
    assert "0.91%" in shown.stdout
