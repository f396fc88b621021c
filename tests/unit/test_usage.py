"""What keys have used: counted once, added up over routers, kept across restarts, new with each day and month."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.errors import QuotaError, UsageError
from fettle.keys import Quotas
from fettle.usage import Count, Ledger, Line, Usage, Used, check, day_of

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0


@pytest.fixture
def ledger(tmp_path: Path):
    made = Ledger(tmp_path / "used.sqlite", NOON)
    yield made
    made.close()


def sync(usage: Usage, router: str, ledger: Ledger, now: float) -> None:
    lines = usage.lines()
    ledger.add(router, lines)
    usage.learn(lines, ledger.used(now), now)


def test_routers_add_up_and_each_counts_its_own_at_once(ledger):
    one, two = Usage(), Usage()
    one.add("ann", 1, 10, NOON)
    two.add("ann", 2, 20, NOON)
    assert one.used("ann", NOON).today == Count(1, 10)
    sync(one, "one", ledger, NOON)
    sync(two, "two", ledger, NOON)
    assert two.used("ann", NOON).today == Count(3, 30)
    two.add("ann", 1, 5, NOON)
    assert two.used("ann", NOON) == Used("2026-11-25", Count(4, 35), Count(4, 35))
    assert one.used("ann", NOON).today == Count(1, 10)
    sync(one, "one", ledger, NOON)
    assert one.used("ann", NOON).today == Count(3, 30)


def test_a_report_whose_reply_was_lost_counts_once(ledger):
    usage = Usage()
    usage.add("ann", 1, 10, NOON)
    ledger.add("one", usage.lines())
    usage.add("ann", 1, 10, NOON)
    sync(usage, "one", ledger, NOON)
    sync(usage, "one", ledger, NOON)
    assert usage.lines() == ()
    assert usage.used("ann", NOON).today == Count(2, 20)


def test_what_was_counted_during_a_report_is_in_the_next(ledger):
    usage = Usage()
    usage.add("ann", 1, 1, NOON)
    lines = usage.lines()
    usage.add("ann", 1, 1, NOON)
    ledger.add("one", lines)
    usage.learn(lines, ledger.used(NOON), NOON)
    assert usage.used("ann", NOON).today == Count(2, 2)
    assert usage.lines() == (Line("2026-11-25", "ann", Count(2, 2)),)


def test_days_and_months_begin_anew(ledger):
    usage = Usage()
    usage.add("ann", 1, 1, NOON)
    sync(usage, "one", ledger, NOON)
    tomorrow, december = NOON + DAY, NOON + 7 * DAY
    assert usage.used("ann", tomorrow) == Used("2026-11-26", Count(), Count(1, 1))
    usage.add("ann", 2, 2, tomorrow)
    sync(usage, "one", ledger, tomorrow)
    assert usage.used("ann", tomorrow) == Used("2026-11-26", Count(2, 2), Count(3, 3))
    assert usage.used("ann", december) == Used("2026-12-02", Count(), Count())


def test_it_survives_the_monitor_and_the_router(tmp_path):
    path = tmp_path / "used.sqlite"
    usage, ledger = Usage(), Ledger(path, NOON)
    usage.add("ann", 3, 30, NOON)
    sync(usage, "one", ledger, NOON)
    ledger.close()
    again, fresh = Ledger(path, NOON), Usage()
    sync(fresh, "two", again, NOON)
    assert fresh.used("ann", NOON).today == Count(3, 30)
    again.close()
    late = Ledger(path, NOON + 100 * DAY)
    assert late.used(NOON) == {}
    late.close()


def test_a_ledger_that_cannot_be_kept_is_said(tmp_path):
    with pytest.raises(UsageError, match="API keys cannot be counted"):
        Ledger(tmp_path / "nowhere" / "used.sqlite", NOON)


@pytest.mark.parametrize(
    ("quotas", "used", "wait_s"),
    [
        (Quotas(requests_per_day=3), Used("", Count(3, 0), Count(3, 0)), 12 * 3600),
        (Quotas(tokens_per_day=100), Used("", Count(1, 101), Count(1, 101)), 12 * 3600),
        (Quotas(requests_per_month=9), Used("", Count(1, 0), Count(9, 0)), 5 * 86_400 + 12 * 3600),
        (Quotas(tokens_per_month=9), Used("", Count(1, 0), Count(1, 9)), 5 * 86_400 + 12 * 3600),
    ],
)
def test_a_quota_that_is_used_up_says_when_it_is_new(quotas, used, wait_s):
    with pytest.raises(QuotaError) as refused:
        check("ann", quotas, used, NOON)
    assert refused.value.retry_after_s == wait_s


def test_what_is_left_is_given():
    quotas = Quotas(requests_per_day=3, tokens_per_day=100, requests_per_month=9, tokens_per_month=300)
    check("ann", quotas, Used("", Count(2, 99), Count(8, 299)), NOON)
    check("ann", Quotas(), Used("", Count(10**9, 10**9), Count(10**9, 10**9)), NOON)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["one", "two"]),
            st.sampled_from(["add", "sync", "lost"]),
            st.integers(0, 3),
            st.floats(0, 40 * DAY),
        ),
        max_size=40,
    )
)
def test_whatever_happens_in_the_end_every_request_is_counted_once(steps):
    """Reports are lost on both ways, routers report at any time; the clock only goes on."""
    with TemporaryDirectory() as scratch:
        ledger = Ledger(Path(scratch) / "used.sqlite", NOON)
        routers, now, counted = {"one": Usage(), "two": Usage()}, NOON, Count()
        for router, step, amount, later in steps:
            now += later / 40
            if step == "add":
                routers[router].add("ann", amount, 2 * amount, now)
                counted = counted.plus(Count(amount, 2 * amount))
            elif step == "sync":
                sync(routers[router], router, ledger, now)
            else:
                ledger.add(router, routers[router].lines())
        for name, usage in routers.items():
            sync(usage, name, ledger, now)
        days = ledger._connection.execute("SELECT SUM(requests), SUM(tokens) FROM used").fetchone()
        assert Count(days[0] or 0, days[1] or 0) == counted
        sync(routers["one"], "one", ledger, now)
        assert routers["one"].used("ann", now).today == ledger.used(now).get("ann", Used(day_of(now))).today
        ledger.close()
