"""What each API key has used: counted by every router, added up and kept by the monitor, compared with quotas.

A router's counts of a UTC day only grow, and are reported under its name, so a report that arrives twice counts once.
What a router has not reported when it is killed, a second's worth, is lost, and routers know of each other's counts a
second late: quotas are kept to within that.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from fettle.errors import QuotaError, UsageError
from fettle.keys import Quotas

NO_QUOTAS = Quotas()
KEPT_DAYS = 62
LOCK_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Count:
    requests: int = 0
    tokens: int = 0

    def plus(self, other: Count) -> Count:
        return Count(self.requests + other.requests, self.tokens + other.tokens)

    def minus(self, other: Count) -> Count:
        return Count(self.requests - other.requests, self.tokens - other.tokens)


@dataclass(frozen=True, slots=True)
class Line:
    """What one router has counted of a key on a day so far."""

    day: str
    key: str
    count: Count


@dataclass(frozen=True, slots=True)
class Used:
    """What all routers together have reported of a key, on this day and in this month."""

    day: str
    today: Count = Count()
    month: Count = Count()


@dataclass(slots=True)
class Usage:
    """One router's counts, and what the monitor said last."""

    _counts: dict[str, dict[str, Count]] = field(default_factory=dict)
    _reported: dict[tuple[str, str], Count] = field(default_factory=dict)
    _fleet: Mapping[str, Used] = field(default_factory=dict)

    def add(self, key: str, requests: int, tokens: int, now: float) -> None:
        days, day = self._counts.setdefault(key, {}), day_of(now)
        days[day] = days.get(day, Count()).plus(Count(requests, tokens))

    def lines(self) -> tuple[Line, ...]:
        """What has changed since the last report that arrived."""
        return tuple(
            Line(day, key, count)
            for key, days in self._counts.items()
            for day, count in days.items()
            if count != self._reported.get((day, key))
        )

    def learn(self, reported: Iterable[Line], fleet: Mapping[str, Used], now: float) -> None:
        """These lines have arrived, and are in what the monitor says."""
        self._fleet = fleet
        for line in reported:
            self._reported[line.day, line.key] = line.count
        today = day_of(now)
        for day, key in [(day, key) for day, key in self._reported if day < today]:
            if self._counts[key].get(day) == self._reported[day, key]:
                del self._counts[key][day], self._reported[day, key]

    def used(self, key: str, now: float) -> Used:
        """By all routers, as far as it is known here."""
        day = day_of(now)
        known = self._fleet.get(key)
        today = known.today if known is not None and known.day == day else Count()
        month = known.month if known is not None and month_of(known.day) == month_of(day) else Count()
        for when, count in self._counts.get(key, {}).items():
            if month_of(when) == month_of(day):
                ahead = count.minus(self._reported.get((when, key), Count()))
                month = month.plus(ahead)
                if when == day:
                    today = today.plus(ahead)
        return Used(day, today, month)


@dataclass(frozen=True, slots=True)
class Meter:
    """One key's counts at one router, with its quotas."""

    key: str
    quotas: Quotas
    usage: Usage
    clock: Callable[[], float] = time.time

    def count(self, requests: int, tokens: int) -> None:
        self.usage.add(self.key, requests, tokens, self.clock())

    def check(self) -> None:
        """Raises QuotaError if a quota is used up."""
        if self.quotas != NO_QUOTAS:
            now = self.clock()
            check(self.key, self.quotas, self.usage.used(self.key, now), now)


def check(name: str, quotas: Quotas, used: Used, now: float) -> None:
    """Raises QuotaError if a quota is used up; says when it is new again."""
    for word, count, ends_s in (("day", used.today, _day_ends_s(now)), ("month", used.month, _month_ends_s(now))):
        for kind in ("requests", "tokens"):
            limit: int | None = getattr(quotas, f"{kind}_per_{word}")
            if limit is not None and getattr(count, kind) >= limit:
                raise QuotaError(
                    f"API key {name!r} has used up its {limit} {kind} of this {word}; the next {word} begins in "
                    f"{ends_s} s, at midnight UTC",
                    retry_after_s=ends_s,
                )


class Ledger:
    """The monitor's file. One thread uses it at a time."""

    def __init__(self, path: Path, now: float) -> None:
        """Raises UsageError if it cannot be written."""
        self._path = path
        try:
            self._connection = sqlite3.connect(
                f"file:{quote(str(path.absolute()))}",
                uri=True,
                timeout=LOCK_WAIT_S,
                isolation_level=None,
                check_same_thread=False,
            )
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS used (day TEXT, key TEXT, router TEXT, requests INTEGER, tokens INTEGER, "
                "PRIMARY KEY (day, key, router)) WITHOUT ROWID"
            )
            oldest = day_of(now - KEPT_DAYS * 86_400)
            self._connection.execute("DELETE FROM used WHERE day < ?", (oldest,))
        except sqlite3.Error as error:
            raise UsageError(f"the use of API keys cannot be counted in {path}: {error}") from None
        self._known: tuple[str, dict[str, Used]] | None = None

    def add(self, router: str, lines: Iterable[Line]) -> None:
        """Raises UsageError if it cannot be written; then nothing is counted, and the router comes again."""
        rows = [(line.day, line.key, router, line.count.requests, line.count.tokens) for line in lines]
        if not rows:
            return
        try:
            with self._connection:
                self._connection.executemany(
                    "INSERT INTO used VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                    "requests = max(requests, excluded.requests), tokens = max(tokens, excluded.tokens)",
                    rows,
                )
        except sqlite3.Error as error:
            raise UsageError(f"the use of API keys cannot be counted in {self._path}: {error}") from None
        self._known = None

    def used(self, now: float | None = None) -> dict[str, Used]:
        """By key, of all routers."""
        day = day_of(time.time() if now is None else now)
        if self._known is None or self._known[0] != day:
            found = self._connection.execute(
                "SELECT key, SUM((day = ?1) * requests), SUM((day = ?1) * tokens), SUM(requests), SUM(tokens) "
                "FROM used WHERE day BETWEEN ?2 AND ?1 GROUP BY key",
                (day, f"{month_of(day)}-01"),
            )
            self._known = day, {key: Used(day, Count(a, b), Count(c, d)) for key, a, b, c, d in found}
        return self._known[1]

    def close(self) -> None:
        self._connection.close()


def ledger_path(keys_file: str | Path) -> Path:
    """Beside the file of keys."""
    return Path(f"{keys_file}.used.sqlite")


def day_of(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")


def month_of(day: str) -> str:
    return day[:7]


def _day_ends_s(now: float) -> int:
    at = datetime.fromtimestamp(now, UTC)
    return _until(at, at.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1))


def _month_ends_s(now: float) -> int:
    at = datetime.fromtimestamp(now, UTC)
    first = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return _until(at, (first + timedelta(days=32)).replace(day=1))


def _until(at: datetime, end: datetime) -> int:
    return max(1, -int(-(end - at).total_seconds() // 1))
