"""What routers count, how it adds up, and the rates and quantiles of the last minutes that are made of it."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.histogram import BINS, HIGHEST_MS, bin_of, edges, quantiles
from deployments.history import SECONDS, History
from deployments.telemetry import (
    ClassGauges,
    FamilyGauges,
    PointGauges,
    Telemetry,
    VariantGauges,
    merged,
    stats_body,
)
from fettle.drift import Drift
from fettle.quality import PointState

CLASSES = ("exact", "1 %", "2 %", "5 %")
POINTS = ("within-0.005", "within-0.01", "within-0.02", "within-0.05", "within-0.1")


def family_gauges(
    name: str = "f", *, gear: int = 0, pressure: float = 0.1, queued: int = 3, replicas: int = 1, rows: int = 0
) -> FamilyGauges:
    return FamilyGauges(
        name,
        "classify",
        "reference",
        100.0,
        [ClassGauges("1 %", 0.01, POINTS[:2], gear, pressure)],
        [VariantGauges("small", 3, replicas, queued, 0.25, rows, rows // 4, 2.5 * rows)],
        [PointGauges("within-0.01", 0.01, 0.0097, [("small", 3), ("reference", 1)])],
    )


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def answer(telemetry: Telemetry, count: int = 1, total_ms: float = 10.0, point: str = "within-0.01") -> None:
    for _ in range(count):
        telemetry.answered(
            "f", "1 %", point, [("small", 0)], tokenize_ms=0.2, queue_ms=1.0, infer_ms=total_ms - 1.5, total_ms=total_ms
        )


class Rig:
    """Routers that report to one history by one clock."""

    def __init__(self, *names: str) -> None:
        self.clock = Clock()
        self.history = History()
        self.routers = {name: Telemetry(self.clock) for name in names}
        self.latest: dict[str, dict] = {}

    def report(self, *names: str, **gauges) -> None:
        for name in names or self.routers:
            self.latest[name] = self.routers[name].snapshot([family_gauges(**gauges)])
            self.history.add(self.clock.now, merged(self.latest))

    def kill(self, name: str) -> None:
        del self.routers[name], self.latest[name]

    @property
    def family(self) -> dict:
        [family] = self.history.view()["families"]
        return family

    @property
    def rates(self) -> list[float]:
        return self.family["history"]["points"].get("within-0.01", [])


# Histograms


@given(st.floats(0, 1e6))
def test_a_value_lies_in_its_bin(ms: float):
    number = bin_of(ms)
    low, high = edges(number)
    assert 0 <= number < BINS
    assert low * (1 - 1e-9) <= ms
    assert ms <= high * (1 + 1e-9) or number == BINS - 1


@pytest.mark.parametrize(("ms", "number"), [(-1.0, 0), (math.nan, 0), (math.inf, BINS - 1), (HIGHEST_MS, BINS - 1)])
def test_odd_times_have_a_bin_too(ms: float, number: int):
    assert bin_of(ms) == number


@pytest.mark.parametrize("scale", [0.05, 3.0, 400.0])
def test_quantiles_are_near_the_true_ones(scale: float):
    values = np.random.default_rng(0).lognormal(math.log(scale), 0.8, 20_000)
    counts: dict[int, float] = {}
    for value in values:
        counts[bin_of(value)] = counts.get(bin_of(value), 0) + 1
    shares = [0.05, 0.5, 0.95, 0.99]
    assert quantiles(counts, shares) == pytest.approx(np.quantile(values, shares).tolist(), rel=0.03)


def test_quantiles_of_nothing():
    assert quantiles({}, [0.5]) is None
    assert quantiles({7: 0.0}, [0.5]) is None


@given(st.dictionaries(st.integers(0, BINS - 1), st.floats(0.01, 1e6), min_size=1))
def test_quantiles_ascend_and_stay_within_the_bins(counts: dict[int, float]):
    found = quantiles(counts, [0.0, 0.25, 0.5, 0.99, 1.0])
    assert found == sorted(found)
    assert edges(min(counts))[0] <= found[0]
    assert found[-1] <= edges(max(counts))[1]


# A router's counters


def test_everything_that_a_request_tells_is_counted():
    telemetry = Telemetry()
    times = {"tokenize_ms": 0.3, "queue_ms": 4.0, "infer_ms": 8.0, "total_ms": 13.0}
    telemetry.answered("f", "1 %", "within-0.01", [("small", 0), ("small", 2), ("reference", 0)], **times)
    telemetry.answered("f", "exact", "reference", [("reference", 0)], **times)
    telemetry.refused("f", "overloaded")
    telemetry.refused("f", "late")
    telemetry.refused("f", "late")
    counters = telemetry.snapshot([family_gauges()])["families"]["f"]["counters"]
    assert counters["points"] == {"within-0.01": 1, "reference": 1}
    assert counters["classes"] == {"1 %": 1, "exact": 1}
    assert counters["places"] == {"small": {"0": 1, "2": 1}, "reference": {"0": 2}}
    assert counters["refused"] == {"overloaded": 1, "late": 2}
    assert counters["times"]["total"] == {str(bin_of(13.0)): 2}
    assert counters["class_times"] == {"1 %": {str(bin_of(13.0)): 1}, "exact": {str(bin_of(13.0)): 1}}
    assert counters["sums"] == {"tokenize": 0.6, "queue": 8.0, "infer": 16.0, "total": 26.0}


def test_a_snapshot_is_json_and_stands_still():
    telemetry = Telemetry()
    answer(telemetry)
    snapshot = telemetry.snapshot([family_gauges()])
    text = json.dumps(snapshot, allow_nan=False)
    answer(telemetry)
    assert json.dumps(snapshot) == text


def test_what_is_not_served_any_more_is_not_reported():
    telemetry = Telemetry()
    telemetry.refused("gone", "failed")
    assert list(telemetry.snapshot([family_gauges()])["families"]) == ["f"]


def test_endless_pressure_is_a_number():
    snapshot = Telemetry().snapshot([family_gauges(pressure=math.inf)])
    json.dumps(snapshot, allow_nan=False)
    assert snapshot["families"]["f"]["classes"][0]["pressure"] > 1e6


# Several routers


def test_routers_are_added_up_and_the_worst_gear_shows():
    a, b = Telemetry(), Telemetry()
    answer(a, 2)
    answer(b, 3)
    b.refused("f", "limited")
    live = merged(
        {
            "a": a.snapshot([family_gauges(gear=1, pressure=0.4, queued=3, replicas=1, rows=8)]),
            "b": b.snapshot([family_gauges(gear=0, pressure=0.9, queued=5, replicas=2, rows=4)]),
        }
    )
    family = live["families"]["f"]
    assert family["counters"]["points"] == {"within-0.01": 5}
    assert family["counters"]["refused"] == {"limited": 1}
    assert sum(family["counters"]["times"]["total"].values()) == 5
    assert family["counters"]["work"] == {"small": {"rows": 12, "batches": 3, "busy_ms": 30.0}}
    [quality] = family["classes"]
    assert (quality["gear"], quality["pressure"]) == (1, 0.9)
    [variant] = family["variants"]
    assert (variant["queued"], variant["replicas"], variant["backlog_s"]) == (8, 2, 0.5)
    assert set(live["routers"]) == {"a", "b"}


def test_merging_changes_no_snapshot_and_knows_every_family():
    a, b = Telemetry(), Telemetry()
    answer(a)
    one = a.snapshot([family_gauges()])
    before = json.dumps(one)
    live = merged({"a": one, "b": b.snapshot([family_gauges(), family_gauges("other")])})
    assert list(live["families"]) == ["f", "other"]
    assert json.dumps(one) == before


def test_no_router_no_families():
    history = History()
    assert history.view()["families"] == []
    history.add(5.0, merged({}))
    assert history.view()["families"] == []


# Rates


def test_a_steady_rate_is_seen_as_one():
    rig = Rig("a")
    for _ in range(30):
        answer(rig.routers["a"], 40)
        rig.clock.now += 1
        rig.report()
    assert rig.rates == [40] * 29
    family = rig.family
    assert family["now"]["points"] == {"within-0.01": 40}
    assert family["now"]["places"] == {"small": {"0": 40}}
    assert family["history"]["places"] == {"small": {"0": [40] * 29}}
    assert family["history"]["classes"] == {"1 %": [40] * 29}
    assert family["history"]["queued"] == {"small": [3] * 29}
    assert family["totals"]["points"] == {"within-0.01": 1200}


def test_reports_that_come_unevenly_make_no_spikes():
    rig = Rig("a")
    draw = random.Random(1)
    for _ in range(60):
        passed = draw.uniform(0.8, 1.4)
        answer(rig.routers["a"], round(100 * passed))
        rig.clock.now += passed
        rig.report()
    assert len(rig.rates) > 50
    assert rig.rates == pytest.approx([100] * len(rig.rates), rel=0.02)


def test_two_routers_that_report_at_different_moments_are_added():
    rig = Rig("a", "b")
    for _ in range(40):
        rig.clock.now += 0.5
        answer(rig.routers["a"], 10)
        rig.report("a")
        rig.clock.now += 0.5
        answer(rig.routers["b"], 30)
        rig.report("b")
    # The first second is not quite covered: "b" was not heard of yet.
    assert rig.rates[1:] == pytest.approx([40] * (len(rig.rates) - 1))


def test_a_router_that_dies_and_a_new_one_make_no_negative_rates_and_no_spike():
    rig = Rig("a", "b")
    for second in range(40):
        if second == 20:
            rig.kill("b")
            rig.routers["c"] = Telemetry(rig.clock)
        rig.clock.now += 1
        for telemetry in rig.routers.values():
            answer(telemetry, 25)
        rig.report()
    assert len(rig.rates) == 39
    assert rig.rates == pytest.approx([50] * 39)


def test_counters_that_start_again_under_the_same_name():
    rig = Rig("a")
    for second in range(20):
        if second == 10:
            rig.routers["a"] = Telemetry(rig.clock)
        rig.clock.now += 1
        answer(rig.routers["a"], 7)
        rig.report()
    assert rig.rates == pytest.approx([7] * 19)


def test_a_monitor_that_starts_late_does_not_see_the_past_as_one_second():
    rig = Rig("a")
    answer(rig.routers["a"], 5000)
    rig.clock.now += 600
    for _ in range(10):
        rig.clock.now += 1
        answer(rig.routers["a"], 5)
        rig.report()
    assert max(rig.rates) == 5


def test_a_router_that_is_silent_for_some_seconds_is_made_good():
    rig = Rig("a", "b")
    for second in range(30):
        rig.clock.now += 1
        answer(rig.routers["a"], 10)
        answer(rig.routers["b"], 10)
        rig.report(*(("a",) if 10 <= second < 15 else ("a", "b")))
        # It is not waited for.
        if second == 14:
            assert len(rig.rates) >= 12
    assert rig.rates == pytest.approx([20] * 29)


def test_seconds_without_traffic_are_zero_and_have_no_quantiles():
    rig = Rig("a")
    for second in range(30):
        rig.clock.now += 1
        if second < 5:
            answer(rig.routers["a"], 10)
        rig.report()
    family = rig.family
    assert rig.rates == [10] * 4 + [0] * 25
    assert family["history"]["times"]["total"]["p50"][5:] == [None] * 24
    assert family["now"]["points"] == {}
    assert family["now"]["times"] == {}


def test_the_window_is_three_minutes():
    rig = Rig("a")
    for second in range(SECONDS + 100):
        rig.clock.now += 1
        answer(rig.routers["a"], second)
        rig.report()
    view = rig.history.view()
    assert (view["seconds"], view["from"]) == (SECONDS, 1000 + 100)
    assert rig.rates == [float(f"{rate:.3g}") for rate in range(100, SECONDS + 100)]


def test_a_clock_that_is_set_back_begins_anew():
    rig = Rig("a")
    for second in range(60):
        rig.clock.now += 1 if second != 30 else -500
        answer(rig.routers["a"], 10)
        rig.report()
    assert rig.history.view()["from"] == 1000 + 30 - 500
    assert rig.rates[1:] == [10] * 28


def test_a_report_that_came_before_adds_nothing():
    rig = Rig("a")
    for _ in range(10):
        rig.clock.now += 1
        answer(rig.routers["a"], 10)
        rig.report()
        rig.history.add(rig.clock.now, merged(rig.latest))
    assert rig.rates == [10] * 9


# Quantiles, gears, work


def test_quantiles_of_the_second_and_of_the_last_ten():
    rig = Rig("a")
    for second in range(30):
        rig.clock.now += 1
        answer(rig.routers["a"], 100, total_ms=100.0 if second == 15 else 10.0)
        rig.report()
        if second == 20:
            assert rig.family["now"]["times"]["total"]["p99"] == pytest.approx(100, rel=0.09)
    columns = rig.family["history"]
    # The report after the sixteenth second counts for it.
    assert [at for at, ms in enumerate(columns["times"]["total"]["p50"]) if ms > 50] == [14]
    assert [at for at, ms in enumerate(columns["times"]["total"]["p99"]) if ms > 50] == [14]
    now = rig.family["now"]
    assert now["times"]["total"]["p50"] == pytest.approx(10, rel=0.09)
    assert now["times"]["queue"]["mean"] == pytest.approx(1.0)
    assert now["class_times"]["1 %"] == {share: now["times"]["total"][share] for share in ("p50", "p95", "p99")}


def test_gear_and_pressure_by_second():
    rig = Rig("a")
    for second in range(12):
        rig.clock.now += 1
        rig.report(gear=int(second >= 6), pressure=0.1 * second)
    columns = rig.family["history"]
    assert columns["gears"]["1 %"] == [0] * 5 + [1] * 6 or columns["gears"]["1 %"] == [0] * 6 + [1] * 5
    assert columns["pressure"]["1 %"] == sorted(columns["pressure"]["1 %"])


def test_a_gauge_stays_until_the_next_report():
    rig = Rig("a")
    for passed in (1, 1, 3, 1):
        rig.clock.now += passed
        rig.report(queued=round(rig.clock.now) - 1000)
    assert rig.family["history"]["queued"]["small"] == [1, 2, 2, 2, 5]


def test_batches_and_busy_time_of_the_last_seconds():
    rig = Rig("a")
    for second in range(20):
        rig.clock.now += 1
        rig.report(rows=80 * second, replicas=2)
    assert rig.family["now"]["work"] == {"small": {"rows_s": 80, "batch_rows": 4, "busy": 0.1}}


# The body of /stats


def state(point: str, family: str = "f") -> PointState:
    drift = Drift(False, 1000, 0.31234567890123, 0.0123456789012, math.nan, None)
    mark = "0123456789abcdef" * 4
    return PointState(
        family, point, mark, 0.01, 0.0097023995, 5011, 37, 1234, 11, 1.2345678901234, 100.0, "watched", None, drift
    )


def test_the_body_is_small_and_is_json():
    """Two families, four classes, five points, three minutes of traffic that is never twice the same."""
    clock, history, draw = Clock(), History(), random.Random(2)
    router = Telemetry(clock)
    rows = 0
    for _ in range(SECONDS + 20):
        clock.now += 1
        for family in ("a", "b"):
            for _ in range(draw.randint(100, 140)):
                times = [draw.lognormvariate(mean, 0.7) for mean in (-1, 1, 2, 2.4)]
                telling = dict(zip(("tokenize_ms", "queue_ms", "infer_ms", "total_ms"), times, strict=True))
                place = (f"variant-{draw.randint(0, 4)}", draw.randint(0, 2))
                router.answered(family, draw.choice(CLASSES), draw.choice(POINTS), [place], **telling)
            router.refused(family, draw.choice(["overloaded", "limited", "late", "failed"]))
        rows += draw.randint(10, 1000)
        gauges = [
            FamilyGauges(
                name,
                "classify",
                "reference",
                100.0,
                [ClassGauges(quality, 0.01, POINTS, draw.randint(0, 4), draw.random()) for quality in CLASSES],
                [
                    VariantGauges(
                        f"variant-{n}", 3, draw.randint(1, 3), draw.randint(0, 900), 0.1, rows, rows // 8, rows
                    )
                    for n in range(5)
                ],
                [PointGauges(point, 0.01, 0.0097, [("variant-0", 3), ("variant-1", 1)]) for point in POINTS],
            )
            for name in ("a", "b")
        ]
        history.add(clock.now, merged({"one": router.snapshot(gauges)}))
    states = [state(point, family) for family in ("a", "b") for point in POINTS]
    body = stats_body(history.view(), states, "1.2.3", at=clock.now, share=0.01)
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    assert len(text) < 100_000
    assert body["live"]["seconds"] == SECONDS
    assert body["quality"][0]["drift"]["scores_p"] is None
    assert {"at", "version", "routers", "live", "quality"} <= set(body)


def test_before_the_monitor_has_answered():
    body = stats_body({}, [], "1.2.3", at=7.0)
    assert body == {"at": 7.0, "version": "1.2.3", "routers": 0, "shadow_share": None, "live": {}, "quality": []}
