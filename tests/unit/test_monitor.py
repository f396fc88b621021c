"""The monitor without Ray: what it keeps, what it tells, and what it makes of files that change under it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments import monitor
from deployments.monitor import Monitor, MonitorReply, RouterReport
from deployments.telemetry import Telemetry
from fettle.config import MonitorConfig
from fettle.errors import FamilyError, QualityError
from fettle.manifest import OperatingPoint, Outcome
from fettle.points import fingerprint
from fettle.quality import Pair, Places, PointState, QualityStore
from fettle.recertify import recertify
from fettle.store import write_atomic
from tests.fakes import FakeVariant, make_fake_family
from tests.unit.test_points import STEP, point
from tests.unit.test_quality import pairs
from tests.unit.test_recertify import give

OUTCOME = Outcome(
    rows=4000, errors=0, disagreement=0.0, answered=[[0.9, 0.1]], cpu_ms_per_row=1.0, reference_cpu_ms_per_row=1.0
)
POINT = point(STEP).model_copy(update={"test": OUTCOME})
LOOSE = point(STEP, 0.05)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = make_fake_family(tmp_path / "family").directory
    give(made, [POINT, LOOSE])
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watching(directory: Path, clock: Clock) -> Monitor:
    return open_monitor(directory, clock)


def open_monitor(directory: Path, clock: Clock) -> Monitor:
    return Monitor({"f": str(directory)}, MonitorConfig(), clock)


def report(
    some: Sequence[Pair] = (), places: Sequence[Places] = (), router: str = "r1", snapshot: dict[str, Any] | None = None
) -> RouterReport:
    return RouterReport(router, tuple(some), tuple(places), snapshot or Telemetry().snapshot([]))


def sync(watching: Monitor, *reports: RouterReport) -> MonitorReply:
    async def all_of_them() -> list[MonitorReply]:
        return await asyncio.gather(*(watching.sync(one) for one in reports or (report(),)))

    return asyncio.run(all_of_them())[-1]


def state_of(reply: MonitorReply, of: OperatingPoint = POINT) -> PointState:
    (state,) = (state for state in reply.states if state.point == of.id)
    return state


# Evidence.


def test_every_router_hears_of_an_alarm(watching: Monitor) -> None:
    assert {state.status for state in sync(watching).states} == {"watched"}
    first = sync(watching, report(pairs(4, 50)))
    assert (state_of(first).shadows, state_of(first).disagreements) == (50, 4)
    sync(watching, report(pairs(20, 100), router="r2"))
    for router in ("r1", "r3"):
        reply = sync(watching, report(router=router))
        assert [(state.point, state.status) for state in reply.states] == [
            (POINT.id, "revoked"),
            (LOOSE.id, "watched"),
        ]
        assert state_of(reply).evidence >= state_of(reply).alarm_at


def test_pairs_are_on_the_disk_when_sync_returns(watching: Monitor, directory: Path, clock: Clock) -> None:
    some = pairs(30, 100)
    before = sync(watching, report(some)).states
    # The monitor is gone without a word, and the router does not know whether its report came.
    again = open_monitor(directory, clock)
    assert sync(again, report(some)).states == before


def test_many_routers_at_a_time_lose_nothing(watching: Monitor) -> None:
    some = [pairs(0, 7) for _ in range(40)]
    sync(watching, *(report(part, router=f"r{number}") for number, part in enumerate(some)))
    assert state_of(sync(watching)).shadows == 280


def test_the_delta_of_the_configuration_decides(directory: Path, clock: Clock) -> None:
    strict = Monitor({"f": str(directory)}, MonitorConfig(delta=1e-12), clock)
    state = state_of(sync(strict, report(pairs(6, 20))))
    assert state.alarm_at == pytest.approx(1e12)
    assert (state.status, state.evidence > 100) == ("watched", True)


def test_a_family_served_twice_has_its_evidence_twice(directory: Path, clock: Clock) -> None:
    both = Monitor({"f": str(directory), "g": str(directory)}, MonitorConfig(), clock)
    reply = sync(both, report(pairs(0, 5) + [replace(pair, family="g") for pair in pairs(0, 9)]))
    assert {(state.family, state.shadows) for state in reply.states if state.point == POINT.id} == {("f", 5), ("g", 9)}


def test_a_family_that_is_not_watched_is_left_out_and_said(watching: Monitor, caplog: pytest.LogCaptureFixture) -> None:
    strays = [replace(pair, family="other") for pair in pairs(3, 3)]
    with caplog.at_level(logging.WARNING, "ray.serve.fettle"):
        assert state_of(sync(watching, report(strays + pairs(0, 2)))).shadows == 2
    assert "other, which is not watched here" in caplog.text


def test_what_cannot_be_written_is_an_error_and_comes_again(watching: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    real = QualityStore.add

    def full(store: QualityStore, some: Sequence[Pair]) -> None:
        raise QualityError("the disk is full")

    monkeypatch.setattr(QualityStore, "add", full)
    some = pairs(0, 5)
    with pytest.raises(QualityError, match="full"):
        sync(watching, report(some))
    monkeypatch.setattr(QualityStore, "add", real)
    assert state_of(sync(watching, report(some))).shadows == 5


def test_the_event_loop_is_free_while_the_disk_is_slow(watching: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    real = QualityStore.add

    def slow(store: QualityStore, some: Sequence[Pair]) -> None:
        assert written.wait(30)
        real(store, some)

    monkeypatch.setattr(QualityStore, "add", slow)

    async def main() -> MonitorReply:
        waiting = asyncio.create_task(watching.sync(report(pairs(0, 5))))
        # The loop runs on: it is what lets the disk go on at all.
        await asyncio.sleep(0.01)
        written.set()
        return await waiting

    assert state_of(asyncio.run(main())).shadows == 5


def test_a_router_that_gives_up_waiting_breaks_nothing(watching: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    real = QualityStore.add

    def slow(store: QualityStore, some: Sequence[Pair]) -> None:
        assert written.wait(30)
        real(store, some)

    monkeypatch.setattr(QualityStore, "add", slow)
    some = pairs(0, 5)

    async def main() -> MonitorReply:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watching.sync(report(some)), 0.02)
        written.set()
        return await watching.sync(report(some))

    assert state_of(asyncio.run(main())).shadows == 5


# At the start and at the end.


def test_the_evidence_can_be_kept_elsewhere(directory: Path, tmp_path: Path, clock: Clock) -> None:
    elsewhere = Monitor({"f": str(directory)}, MonitorConfig(directory=str(tmp_path / "kept")), clock)
    sync(elsewhere, report(pairs(0, 5)))
    assert (tmp_path / "kept" / "f.sqlite").is_file()
    assert not (directory / "quality").exists()


def test_where_it_cannot_be_kept_the_monitor_does_not_start(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QualityError, match=r"monitor\.directory"):
        Monitor({"f": str(directory)}, MonitorConfig(directory=str(tmp_path / "file")))


def test_without_a_family_it_does_not_start(tmp_path: Path, directory: Path) -> None:
    (directory / "family.json").write_text("{")
    with pytest.raises(FamilyError, match="not valid JSON"):
        Monitor({"f": str(directory)}, MonitorConfig())


def test_it_closes(watching: Monitor) -> None:
    async def main() -> None:
        await watching.sync(report(pairs(0, 5)))
        await watching.close()

    asyncio.run(main())
    with pytest.raises(RuntimeError):
        sync(watching)


# The family's file.


def test_a_new_certificate_is_taken_up_and_ends_the_revocation(watching: Monitor, directory: Path) -> None:
    sync(watching, report(pairs(20, 100, POINT)))
    sync(watching, report(pairs(0, 1500, POINT, served=False)))
    made = recertify(directory, name="f")
    (renewed, other) = sync(watching).states
    assert renewed.fingerprint == fingerprint(made.point) != fingerprint(POINT)
    assert (renewed.status, renewed.shadows, renewed.certified_rows) == ("watched", 0, 1500)
    assert other.fingerprint == fingerprint(LOOSE)
    # A router that has not heard of it yet reports on the old one; that is counted, and changes nothing here.
    assert sync(watching, report(pairs(5, 5, POINT))).states == (renewed, other)


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1', b'{"schema_version": 99}'])
def test_a_damaged_file_changes_nothing_and_is_said_once(
    watching: Monitor, directory: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (directory / "family.json").read_bytes()
    before = sync(watching, report(pairs(20, 100))).states
    (directory / "family.json").write_bytes(content)
    with caplog.at_level(logging.WARNING, "ray.serve.fettle"):
        assert sync(watching).states == before
        assert sync(watching, report(pairs(0, 30, LOOSE))).states[0] == before[0]
    assert caplog.text.count("the operating points stay as they were") == 1
    assert "family.json" in caplog.text
    (directory / "family.json").unlink()
    assert sync(watching).states[0] == before[0]
    write_atomic(directory / "family.json", whole)
    give(directory, [POINT])
    assert sync(watching).states == before[:1]


def test_a_family_that_was_rebuilt_is_watched_as_it_was(
    watching: Monitor, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_fake_family(tmp_path / "other", variants=[FakeVariant("b")]).directory
    give(other, [point(STEP, 0.3)])
    (directory / "family.json").write_bytes((other / "family.json").read_bytes())
    with caplog.at_level(logging.WARNING, "ray.serve.fettle"):
        # The routers still serve the old points, and must hear of the alarm.
        assert state_of(sync(watching, report(pairs(20, 100)))).status == "revoked"
    assert "was rebuilt; restart the service" in caplog.text


def test_an_unchanged_file_is_not_read(watching: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(watching)

    def never(*_: object) -> None:
        raise AssertionError("family.json was read again")

    monkeypatch.setattr(monitor, "parse_manifest", never)
    sync(watching)


# Drift.


def seen(first: int, second: int, of: OperatingPoint = POINT) -> Places:
    return Places("f", of.id, fingerprint(of), ((first, second),), (0,) * 20)


def test_drift_is_shown_once_there_are_answers_enough(watching: Monitor) -> None:
    assert state_of(sync(watching, report(places=[seen(450, 50)]))).drift is None
    calm = state_of(sync(watching, report(places=[seen(450, 50)], router="r2"))).drift
    assert calm is not None
    assert (calm.warning, calm.answers) == (False, 1000)
    assert state_of(sync(watching, report(places=[seen(300, 699)]))).drift == calm
    warned = state_of(sync(watching, report(places=[seen(0, 1)]))).drift
    assert warned is not None
    assert warned.warning


def test_a_point_that_was_not_tried_on_test_has_no_drift(watching: Monitor) -> None:
    reply = sync(watching, report(places=[Places("f", LOOSE.id, fingerprint(LOOSE), ((2000,),), (0,) * 20)]))
    assert state_of(reply, LOOSE).drift is None
    assert sync(watching, report(places=[replace(seen(1, 1), family="x"), replace(seen(1, 1), fingerprint="y")]))


# Telemetry.


def test_routers_that_are_silent_for_long_are_forgotten(watching: Monitor, clock: Clock) -> None:
    asked: list[set[str]] = []
    real = monitor.merged

    def noting(snapshots: Any) -> dict[str, Any]:
        asked.append(set(snapshots))
        return real(snapshots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "merged", noting)
        sync(watching, report(router="r1"))
        clock.now += 4
        sync(watching, report(router="r2"))
        clock.now += 7
        sync(watching, report(router="r3"))
    assert asked == [{"r1"}, {"r1", "r2"}, {"r2", "r3"}]
