"""What is known in production about the promises of a family: pairs of answers, counted, in a file that survives.

One SQLite file for one family as it is served. The monitor is its only writer; `fettle recertify` reads it. A pair that
`add` has returned for is on the disk, and an alarm is latched in the same transaction as the pairs that raised it, so
that no crash comes between the two. Totals are kept as they grow; the pairs themselves are there so that one which is
reported twice counts once, and to look at.

Decides nothing about routing, and knows no clock: times are those of the pairs.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from fettle.drift import Drift as Drift
from fettle.errors import QualityError
from fettle.evidence import alarms, log_evidence
from fettle.manifest import OperatingPoint
from fettle.points import fingerprint

SCHEMA = 1
FOLDER = "quality"
# Of each fingerprint, the newest; totals count all that ever came.
KEPT_PAIRS = 200_000
MOST_EVIDENCE = 1e300
LOCK_WAIT_S = 10.0

TABLES = """
CREATE TABLE points (
    number INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL UNIQUE,
    family TEXT NOT NULL,
    point TEXT NOT NULL,
    alpha REAL,
    served_rows INTEGER NOT NULL DEFAULT 0,
    served_errors INTEGER NOT NULL DEFAULT 0,
    trial_rows INTEGER NOT NULL DEFAULT 0,
    trial_errors INTEGER NOT NULL DEFAULT 0,
    kept INTEGER NOT NULL DEFAULT 0,
    revoked_at REAL
);
CREATE TABLE pairs (
    number INTEGER PRIMARY KEY,
    point INTEGER NOT NULL REFERENCES points,
    id TEXT NOT NULL UNIQUE,
    differs INTEGER NOT NULL,
    served INTEGER NOT NULL,
    at REAL NOT NULL
);
CREATE INDEX pairs_of_point ON pairs (point);
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """One shadow comparison: a point's answer against the reference's, by `fettle.answers.disagreements`.

    `id` is the router's and unique. `served` is false where the point is revoked and was run in the shadow only. `at`
    is in Unix seconds.
    """

    id: str
    family: str
    point: str
    fingerprint: str
    differs: bool
    served: bool
    at: float


@dataclass(frozen=True, slots=True)
class Places:
    """What one point answered since a router's last report, without labels: rows by [step][stage], and by score.

    `scores` are in the bins of `fettle.drift.score_bins`.
    """

    family: str
    point: str
    fingerprint: str
    answered: tuple[tuple[int, ...], ...]
    scores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PointState:
    """A point's promise and what speaks against it. The alarm comes when `evidence` reaches `alarm_at`.

    `shadows` and `disagreements` are the pairs that count for the alarm: answers that clients got, up to the alarm.
    `drift` is None while there are too few answers.
    """

    family: str
    point: str
    fingerprint: str
    alpha: float
    upper_bound: float
    certified_rows: int
    certified_errors: int
    shadows: int
    disagreements: int
    evidence: float
    alarm_at: float
    status: Literal["watched", "revoked"]
    revoked_at: float | None
    drift: Drift | None


@dataclass(frozen=True, slots=True)
class Tally:
    """Totals of one fingerprint. `served`: pairs that count for the alarm; `trial`: of answers that nobody got."""

    served_rows: int = 0
    served_errors: int = 0
    trial_rows: int = 0
    trial_errors: int = 0
    revoked_at: float | None = None

    @property
    def for_certificate(self) -> tuple[int, int]:
        """Errors and rows that a new certificate may rest on.

        After an alarm only what came since: the pairs before it were chosen by the alarm for having too many errors.
        """
        if self.revoked_at is not None:
            return self.trial_errors, self.trial_rows
        return self.served_errors + self.trial_errors, self.served_rows + self.trial_rows


def store_path(family: Path, name: str, directory: Path | str | None = None) -> Path:
    """Where the evidence about a family lies that is served under this name; `directory` is `monitor.directory`."""
    return (family / FOLDER if directory is None else Path(directory)) / f"{name}.sqlite"


class QualityStore:
    """The file. Safe against SIGKILL at any moment; made for one thread at a time.

    A rollback journal and not a write-ahead log, which needs shared memory that network file systems lack.
    """

    def __init__(self, path: Path, delta: float = 0.01, *, read_only: bool = False) -> None:
        """`delta`: an alarm needs evidence of 1/delta.

        Raises:
            QualityError: the file cannot be written, is damaged, or is another version's; with `read_only`, also if it
                is missing.
        """
        self.path = path
        self.delta = delta
        if read_only and not path.is_file():
            raise QualityError(
                f"{path}: no such file, so no pairs were collected; serve the family with monitor.share above 0, "
                "or name the directory where its evidence is kept"
            )
        with self._explained():
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for writing in any case: a reader may have to undo what a killed writer left half done.
            mode = "rw" if read_only else "rwc"
            self._connection = sqlite3.connect(
                f"file:{quote(str(path.absolute()))}?mode={mode}",
                uri=True,
                timeout=LOCK_WAIT_S,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._prepare(read_only)
            except BaseException:  # whatever it is, nobody else can close it
                self._connection.close()
                raise

    def close(self) -> None:
        self._connection.close()

    def watch(self, family: str, points: Iterable[OperatingPoint]) -> None:
        """Make the points known with what is promised of them; pairs that came before count for them, too.

        Raises:
            QualityError: it cannot be written.
        """
        with self._transaction() as connection:
            for point in points:
                number = self._number(fingerprint(point), family, point.id)
                connection.execute("UPDATE points SET alpha = ? WHERE number = ?", (point.certificate.alpha, number))
                self._latch(number, None)

    def add(self, pairs: Sequence[Pair]) -> None:
        """Count the pairs, each id once; they are on the disk when it returns, and so is an alarm that they raise.

        Raises:
            QualityError: they cannot be written; none of them is.
        """
        if not pairs:
            return
        with self._transaction():
            latest: dict[int, float] = {}
            for pair in pairs:
                number = self._number(pair.fingerprint, pair.family, pair.point)
                if self._count(number, pair):
                    latest[number] = max(pair.at, latest.get(number, -math.inf))
            for number, at in latest.items():
                self._latch(number, at)
                self._forget_oldest(number)

    def tally(self, mark: str) -> Tally:
        """The totals of a point's fingerprint; all 0 for one that is not known."""
        with self._explained():
            row = self._connection.execute(
                "SELECT served_rows, served_errors, trial_rows, trial_errors, revoked_at FROM points "
                "WHERE fingerprint = ?",
                (mark,),
            ).fetchone()
        return Tally(*row) if row else Tally()

    def states(
        self, family: str, points: Iterable[OperatingPoint], drift: Mapping[str, Drift | None] | None = None
    ) -> tuple[PointState, ...]:
        """What is known of these points; `drift` by fingerprint."""
        found = []
        for point in points:
            mark = fingerprint(point)
            tally = self.tally(mark)
            found.append(_state(family, point, mark, tally, self.delta, (drift or {}).get(mark)))
        return tuple(found)

    def _prepare(self, read_only: bool) -> None:
        self._connection.execute("PRAGMA synchronous = FULL")
        if read_only:
            self._connection.execute("PRAGMA query_only = ON")
            self._check_version()
            return
        self._connection.execute("PRAGMA journal_mode = DELETE")
        with self._transaction() as connection:
            if not self._version():
                for statement in TABLES.split(";"):
                    connection.execute(statement)
            else:
                self._check_version()
            # Written even if it is there: that the file cannot be written is found out now, not at the first pair.
            connection.execute(f"PRAGMA user_version = {SCHEMA}")

    def _check_version(self) -> None:
        found = self._version()
        if found != SCHEMA:
            raise QualityError(
                f"{self.path}: written by another version of fettle (schema {found}, this one reads {SCHEMA}); "
                "use that version, or give monitor.directory another directory"
            )

    def _version(self) -> int:
        version: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
        return version

    def _number(self, mark: str, family: str, point: str) -> int:
        self._connection.execute(
            "INSERT INTO points (fingerprint, family, point) VALUES (?, ?, ?) ON CONFLICT (fingerprint) DO NOTHING",
            (mark, family, point),
        )
        number: int = self._connection.execute("SELECT number FROM points WHERE fingerprint = ?", (mark,)).fetchone()[0]
        return number

    def _count(self, number: int, pair: Pair) -> bool:
        """False for a pair that is there already."""
        added = self._connection.execute(
            "INSERT INTO pairs (point, id, differs, served, at) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
            (number, pair.id, pair.differs, pair.served, pair.at),
        )
        if added.rowcount < 1:
            return False
        if pair.served:
            # What was still under way when the alarm was raised counts for neither side.
            statement = (
                "UPDATE points SET kept = kept + 1, served_rows = served_rows + (revoked_at IS NULL), "
                "served_errors = served_errors + (revoked_at IS NULL) * ? WHERE number = ?"
            )
        else:
            statement = (
                "UPDATE points SET kept = kept + 1, trial_rows = trial_rows + 1, trial_errors = trial_errors + ? "
                "WHERE number = ?"
            )
        self._connection.execute(statement, (pair.differs, number))
        return True

    def _latch(self, number: int, at: float | None) -> None:
        rows, errors, alpha, revoked_at = self._connection.execute(
            "SELECT served_rows, served_errors, alpha, revoked_at FROM points WHERE number = ?", (number,)
        ).fetchone()
        if alpha is None or revoked_at is not None or not alarms(errors, rows, alpha, self.delta):
            return
        if at is None:
            at = self._connection.execute("SELECT max(at) FROM pairs WHERE point = ?", (number,)).fetchone()[0]
        self._connection.execute("UPDATE points SET revoked_at = ? WHERE number = ?", (at, number))

    def _forget_oldest(self, number: int) -> None:
        (kept,) = self._connection.execute("SELECT kept FROM points WHERE number = ?", (number,)).fetchone()
        if kept <= KEPT_PAIRS:
            return
        self._connection.execute(
            "DELETE FROM pairs WHERE number IN (SELECT number FROM pairs WHERE point = ? ORDER BY number LIMIT ?)",
            (number, kept - KEPT_PAIRS),
        )
        self._connection.execute("UPDATE points SET kept = ? WHERE number = ?", (KEPT_PAIRS, number))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite ends some failed transactions itself, as on a full disk.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise QualityError(
                f"{self.path}: evidence cannot be kept there ({reason}); give monitor.directory a directory that can "
                "be written, or move a damaged file away"
            ) from error


def _state(
    family: str, point: OperatingPoint, mark: str, tally: Tally, delta: float, drift: Drift | None
) -> PointState:
    certificate = point.certificate
    logarithm = float(log_evidence(tally.served_errors, tally.served_rows, certificate.alpha))
    return PointState(
        family=family,
        point=point.id,
        fingerprint=mark,
        alpha=certificate.alpha,
        upper_bound=certificate.upper_bound,
        certified_rows=certificate.rows,
        certified_errors=certificate.errors,
        shadows=tally.served_rows,
        disagreements=tally.served_errors,
        evidence=math.exp(min(logarithm, math.log(MOST_EVIDENCE))),
        alarm_at=1 / delta,
        status="watched" if tally.revoked_at is None else "revoked",
        revoked_at=tally.revoked_at,
        drift=drift,
    )
