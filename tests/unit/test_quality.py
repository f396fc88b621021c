"""The store of pairs: counted once, latched for good, and never lost once acknowledged."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import orjson
import pytest

from fettle import quality
from fettle.certificates import certify
from fettle.errors import QualityError
from fettle.evidence import alarms, log_evidence
from fettle.manifest import OperatingPoint
from fettle.points import fingerprint
from fettle.quality import MOST_EVIDENCE, Drift, Pair, QualityStore, Tally, store_path
from tests.unit.test_points import STEP, point

POINT = point(STEP)
numbers = count()


def pairs(
    errors: int, rows: int, of: OperatingPoint = POINT, *, served: bool = True, at: float | None = None
) -> list[Pair]:
    """So many new pairs, the first of which differ; each a second after the one before unless `at` says otherwise."""
    made = []
    for place in range(rows):
        number = next(numbers)
        made.append(
            Pair(
                id=f"router-{number}",
                family="f",
                point=of.id,
                fingerprint=fingerprint(of),
                differs=place < errors,
                served=served,
                at=1000.0 + number if at is None else at,
            )
        )
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "quality" / "f.sqlite"


@pytest.fixture
def store(path: Path) -> QualityStore:
    made = QualityStore(path)
    made.watch("f", [POINT])
    return made


def test_what_was_added_is_counted(store: QualityStore) -> None:
    store.add(pairs(2, 500))
    store.add(pairs(1, 300))
    store.add([])
    (state,) = store.states("f", [POINT])
    assert (state.shadows, state.disagreements) == (800, 3)
    assert (state.family, state.point, state.fingerprint) == ("f", POINT.id, fingerprint(POINT))
    assert (state.alpha, state.certified_rows, state.certified_errors) == (0.01, 1000, 0)
    assert state.upper_bound == POINT.certificate.upper_bound
    assert state.evidence == pytest.approx(2.718281828 ** float(log_evidence(3, 800, 0.01)))
    assert state.alarm_at == pytest.approx(100)
    assert (state.status, state.revoked_at, state.drift) == ("watched", None, None)


def test_a_point_without_pairs_has_no_evidence(store: QualityStore) -> None:
    other = point(STEP, 0.05)
    states = store.states("f", [POINT, other], {fingerprint(other): Drift(True, 1000, 0.0, 1.0, None, None)})
    assert [(state.shadows, state.evidence) for state in states] == [(0, pytest.approx(1.0))] * 2
    assert states[1].drift is not None
    assert states[0].drift is None
    assert orjson.loads(orjson.dumps([asdict(state) for state in states]))[1]["drift"]["warning"]


def test_an_id_counts_once(store: QualityStore) -> None:
    some = pairs(3, 10)
    store.add(some)
    store.add(some[:5] + pairs(0, 1) + some[3:])
    store.add([replace(some[0], differs=False)] * 3)
    assert store.tally(fingerprint(POINT)) == Tally(served_rows=11, served_errors=3)


def test_an_alarm_is_latched_and_survives(store: QualityStore, path: Path) -> None:
    some = pairs(9, 9)
    needed = next(errors for errors in range(1, 9) if alarms(errors, errors, 0.01, 0.01))
    store.add(some[: needed - 1])
    assert store.states("f", [POINT])[0].status == "watched"
    store.add(some[needed - 1 : needed])
    (state,) = store.states("f", [POINT])
    assert (state.status, state.revoked_at) == ("revoked", some[needed - 1].at)
    assert state.evidence >= state.alarm_at
    # Served pairs that were under way, all of them fine, do not take it back and do not change what it rested on.
    store.add(pairs(0, 5000))
    store.close()
    again = QualityStore(path)
    again.watch("f", [POINT])
    assert again.states("f", [POINT]) == (state,)


def test_evidence_stays_a_number(store: QualityStore) -> None:
    store.add(pairs(2000, 2000))
    assert store.states("f", [POINT])[0].evidence == pytest.approx(MOST_EVIDENCE)


def test_the_alarm_is_that_of_its_own_point(store: QualityStore) -> None:
    other = point(STEP, 0.2)
    store.watch("f", [other])
    store.add(pairs(5, 40) + pairs(5, 40, other))
    assert [state.status for state in store.states("f", [POINT, other])] == ["revoked", "watched"]


def test_trials_in_the_shadow_count_for_a_certificate_and_for_no_alarm(store: QualityStore) -> None:
    store.add(pairs(40, 50, served=False))
    (state,) = store.states("f", [POINT])
    assert (state.status, state.shadows, state.disagreements) == ("watched", 0, 0)
    store.add(pairs(1, 100))
    assert store.tally(fingerprint(POINT)).for_certificate == (41, 150)


def test_after_an_alarm_only_what_came_since_counts_for_a_certificate(store: QualityStore) -> None:
    store.add(pairs(30, 100))
    store.add(pairs(0, 50) + pairs(2, 700, served=False))
    assert store.tally(fingerprint(POINT)).for_certificate == (2, 700)


def test_a_new_certificate_starts_anew(store: QualityStore) -> None:
    store.add(pairs(30, 100))
    renewed = POINT.model_copy(update={"certificate": certify(2, 700, 0.02, 0.05)})
    store.watch("f", [renewed])
    (state,) = store.states("f", [renewed])
    assert (state.status, state.shadows, state.alpha) == ("watched", 0, 0.02)


def test_pairs_of_a_point_that_is_not_known_yet_count_when_it_is(path: Path) -> None:
    store = QualityStore(path)
    some = pairs(30, 100)
    store.add(some)
    assert store.tally(fingerprint(POINT)) == Tally(served_rows=100, served_errors=30)
    store.watch("f", [POINT])
    (state,) = store.states("f", [POINT])
    assert (state.status, state.revoked_at) == ("revoked", some[-1].at)


def test_the_newest_pairs_are_kept_and_all_are_counted(
    store: QualityStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "KEPT_PAIRS", 50)
    for _ in range(10):
        store.add(pairs(0, 33))
    other = point(STEP, 0.2)
    store.add(pairs(0, 20, other))
    assert store.tally(fingerprint(POINT)).served_rows == 330
    with sqlite3.connect(path) as connection:
        kept = connection.execute("SELECT count(*), min(at), max(at) FROM pairs GROUP BY point").fetchall()
    assert [row[0] for row in kept] == [50, 20]
    assert kept[0][2] - kept[0][1] == 49


# What can go wrong with the file.


def test_a_transaction_that_fails_leaves_nothing_behind(store: QualityStore) -> None:
    bad = pairs(5, 5)
    bad[3] = replace(bad[3], at=None)  # type: ignore[arg-type]
    with pytest.raises(QualityError, match="NOT NULL"):
        store.add(bad)
    assert store.tally(fingerprint(POINT)) == Tally()
    store.add(pairs(0, 3))
    assert store.tally(fingerprint(POINT)).served_rows == 3


def test_another_version_is_refused(store: QualityStore, path: Path) -> None:
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    for read_only in (False, True):
        with pytest.raises(QualityError, match=r"f\.sqlite: written by another version .* 7.*monitor\.directory"):
            QualityStore(path, read_only=read_only)


def test_what_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("not a database " * 100)
    with pytest.raises(QualityError, match=r"f\.sqlite.*not a database.*monitor\.directory"):
        QualityStore(path)


def test_where_nothing_can_be_written_the_remedy_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QualityError, match=r"f\.sqlite.*monitor\.directory"):
        QualityStore(tmp_path / "file" / "quality" / "f.sqlite")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(QualityError, match=r"monitor\.directory"):
        QualityStore(tmp_path / "f.sqlite")


def test_a_reader_makes_nothing_and_changes_nothing(store: QualityStore, path: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"no such file, so no pairs were collected.*monitor\.share"):
        QualityStore(tmp_path / "none" / "f.sqlite", read_only=True)
    assert not (tmp_path / "none").exists()
    reader = QualityStore(path, read_only=True)
    store.add(pairs(1, 10))
    assert reader.tally(fingerprint(POINT)).served_rows == 10
    with pytest.raises(QualityError, match="readonly"):
        reader.add(pairs(0, 1))


def test_two_writers_take_turns(store: QualityStore, path: Path) -> None:
    # While Serve replaces the monitor there may be two for a moment.
    other = QualityStore(path)
    some = pairs(1, 10)
    store.add(some)
    other.add(some[5:] + pairs(0, 5))
    assert store.tally(fingerprint(POINT)) == Tally(served_rows=15, served_errors=1)


def test_where_the_file_lies(tmp_path: Path) -> None:
    assert store_path(tmp_path, "a") == tmp_path / "quality" / "a.sqlite"
    assert store_path(tmp_path, "a", "/elsewhere") == Path("/elsewhere/a.sqlite")


def test_odd_characters_in_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a?b#c %20" / "f.sqlite"
    QualityStore(path).close()
    assert path.is_file()


# Killed.


def write_until_killed(path: Path, number: int, acknowledge: int) -> None:
    store = QualityStore(path)
    store.watch("f", [POINT])
    for batch in count():
        made = [
            replace(pair, id=f"{number}-{batch}-{place}", differs=batch >= 20 and place == 0)
            for place, pair in enumerate(pairs(0, 5, at=1.0))
        ]
        store.add(made)
        revoked = store.tally(fingerprint(POINT)).revoked_at is not None
        os.write(acknowledge, orjson.dumps([[pair.id for pair in made], revoked]) + b"\n")


def test_nothing_that_was_acknowledged_is_lost_by_sigkill(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    chance = random.Random(0)
    acknowledged: set[str] = set()
    revoked = False
    for number in range(25):
        reading, writing = os.pipe()
        process = context.Process(target=write_until_killed, args=(path, number, writing))
        process.start()
        os.close(writing)
        assert process.pid is not None
        with os.fdopen(reading, "rb") as file:
            # So many batches are done, however slow the disk is, and another is under way.
            lines = [file.readline() for _ in range(chance.randrange(40))]
            time.sleep(chance.random() * 0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            for line in [*lines, *file]:
                if line.endswith(b"\n"):
                    ids, latched = orjson.loads(line)
                    acknowledged.update(ids)
                    revoked |= latched
        store = QualityStore(path)
        store.watch("f", [POINT])
        tally = store.tally(fingerprint(POINT))
        store.close()
        with sqlite3.connect(path) as connection:
            found = {row[0] for row in connection.execute("SELECT id FROM pairs")}
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        assert acknowledged <= found
        assert tally.revoked_at is not None or tally.served_rows == len(found)
        assert (tally.revoked_at is not None) == alarms(tally.served_errors, tally.served_rows, 0.01, 0.01)
        assert tally.revoked_at is not None or not revoked
    assert len(acknowledged) > 500
    assert revoked
