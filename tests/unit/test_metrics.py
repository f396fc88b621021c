"""The names of the metrics, the page about them, and what is told under them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments import metrics
from deployments.exporter import Exporter
from deployments.fleet import Fleet, deployment_name
from deployments.histogram import BINS, BUCKETS_S, SIZES, bin_of, buckets, edges, size_of
from deployments.metrics import METRICS, Kind, Metric, reference_table
from deployments.monitor_metrics import LEAST_EVIDENCE, tell_points
from deployments.router_metrics import RouterMetrics
from deployments.telemetry import Generated
from fettle.quality import PointState
from tests.fakes import FakeVariant, make_fake_family, make_point, make_step
from tests.inprocess import make_app, make_router

ROOT = Path(__file__).parents[2]
# What a client could make as many of as it likes.
UNBOUNDED = {"request_id", "path", "model", "client", "key", "message"}


class Recorder:
    """What Ray's instruments would have been told: totals of counters and the last value of gauges, by series."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.calls = 0

    def instrument(self, metric: Metric):
        def tell(value: float, tags: Mapping[str, str]) -> None:
            assert tuple(tags) == metric.labels
            assert all(isinstance(tag, str) for tag in tags.values())
            self.calls += 1
            series = (metric.name, frozenset(tags.items()))
            if metric.kind is Kind.COUNTER:
                # As Ray does: a counter cannot be told that nothing happened.
                assert value > 0
                self.values[series] = self.values.get(series, 0.0) + value
            else:
                self.values[series] = value

        return tell

    def value(self, name: str, **tags: str) -> float:
        return self.values[name, frozenset(tags.items())]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.values}


# The file


def test_names_are_valid_and_there_once():
    names = [name for metric in METRICS for name in metric.series]
    assert len(names) == len(set(names)) > 60
    for metric in METRICS:
        assert re.fullmatch(r"fettle_[a-z0-9_]*[a-z0-9]", metric.name)
        assert not metric.name.endswith(("_total", "_bucket", "_count", "_sum"))
        for label in metric.labels:
            assert re.fullmatch(r"[a-z][a-z_]*", label)
            assert label not in UNBOUNDED | {"le", "WorkerId", "SessionName"}


def test_every_metric_has_a_help_text_and_a_teller():
    for metric in METRICS:
        assert len(metric.help) > 10
        assert metric.told in ("router", "replica", "monitor", "controller")


def test_times_are_in_seconds():
    for metric in METRICS:
        assert not re.search(r"(_ms|milliseconds|minutes)", metric.name)
        if metric.kind is Kind.HISTOGRAM and metric is not metrics.BATCH_ROWS:
            assert metric.name.endswith("_seconds")


def test_the_page_is_made_of_this_file():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert reference_table() in page, "run `python -m deployments.metrics` and put what it prints into the page"


# Histograms


@given(st.floats(0, 1e6))
def test_a_time_is_in_the_bucket_that_prometheus_expects(ms: float):
    bins = [0] * BINS
    bins[bin_of(ms)] = 1
    found = buckets(bins)
    assert sum(found) == 1
    place = found.index(1)
    # Within rounding of the edges, which have six digits in a label.
    assert ms / 1000 <= float(BUCKETS_S[place].replace("+Inf", "inf")) * (1 + 1e-5)
    if place:
        assert ms / 1000 >= float(BUCKETS_S[place - 1]) * (1 - 1e-5)


def test_buckets_lose_nothing():
    bins = list(range(BINS))
    assert sum(buckets(bins)) == sum(bins)
    assert len(buckets(bins)) == len(BUCKETS_S) == 36
    last = max(number for number in range(BINS) if buckets([int(n == number) for n in range(BINS)])[-1] == 0)
    assert edges(last)[1] / 1000 == pytest.approx(float(BUCKETS_S[-2]), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 64, 1024, 1025, 10**6])
def test_a_batch_is_in_the_smallest_bucket_that_holds_it(rows: int):
    place = size_of(rows)
    assert rows <= float(SIZES[place].replace("+Inf", "inf"))
    assert place == 0 or rows > float(SIZES[place - 1])


# The exporter


def test_counters_are_told_what_they_grew_by():
    seen = Recorder()
    to = Exporter(seen.instrument)
    for total in (3, 3, 10):
        to.total(metrics.REQUESTS, ("f", "1 %", "p"), total)
    assert seen.value("fettle_requests", family="f", point="p", **{"class": "1 %"}) == 10
    assert seen.calls == 2


def test_a_histogram_is_cumulative_with_an_exact_sum():
    seen = Recorder()
    to = Exporter(seen.instrument)
    bins = [0] * BINS
    times = [0.1, 3.0, 3.1, 50.0, 1e6]
    for ms in times:
        bins[bin_of(ms)] += 1
        to.seconds(metrics.QUEUE_SECONDS, ("f",), bins, sum(times[: times.index(ms) + 1]))
    below = [seen.values.get(("fettle_queue_seconds_bucket", frozenset({"family": "f", "le": le}.items())), 0)
             for le in BUCKETS_S]  # fmt: skip
    assert below == sorted(below)
    assert below[-1] == seen.value("fettle_queue_seconds_count", family="f") == len(times)
    assert seen.value("fettle_queue_seconds_sum", family="f") == pytest.approx(sum(times) / 1000)
    assert below[[float(le) > 0.0031 for le in BUCKETS_S[:-1]].index(True)] >= 3


def test_what_did_not_change_costs_no_call():
    seen = Recorder()
    to = Exporter(seen.instrument)
    bins = [1] * BINS
    to.seconds(metrics.QUEUE_SECONDS, ("f",), bins, 5.0)
    before = seen.calls
    to.seconds(metrics.QUEUE_SECONDS, ("f",), bins, 5.0)
    assert seen.calls == before


# What a router tells


@pytest.mark.anyio
async def test_a_router_tells_what_it_did(tmp_path):
    family = make_fake_family(
        tmp_path / "f",
        variants=[FakeVariant("ref"), FakeVariant("small", stages=2)],
        points=[make_point("within-0.05", 0.05, make_step("small", 0.5, 0.0))],
    )
    router = make_router([family])
    seen = Recorder()
    fleet = Fleet()
    small = deployment_name("fake", "small", family.version)
    fleet.see(small, 1, 2, ["a"])
    fleet.see(small, 1, 2, ["a", "b"])
    fleet.see(small, 2, 2, ["b", "c"])
    asked = router.ask(None, family.manifest.task.kind)
    tokenized = await router.tokenize(asked.family, ["the quick fox", "brown"])
    await router.infer(asked, tokenized)
    router.telemetry.refused("fake", "overloaded")
    router.telemetry.generated(
        "fake", Generated("ref", ["stop", "length"], 9, 4, ["small"], first_ms=30.0, token_ms=5.0)
    )
    router.journal.count(429, "overloaded")
    told = RouterMetrics(router, fleet, Exporter(seen.instrument), {("fake", "small"): 3})
    told.tell()
    told.tell()
    # The class that requests get here is exact: nothing is certified at 1 %.
    assert seen.value("fettle_requests", family="fake", point="ref", **{"class": "exact"}) == 1
    assert seen.value("fettle_rows", family="fake", variant="ref", exit="0") == 2
    assert seen.value("fettle_refusals", family="fake", reason="overloaded") == 1
    assert seen.value("fettle_errors", status="429", code="overloaded") == 1
    assert seen.value("fettle_input_tokens", family="fake") == tokenized.tokens == 8
    assert seen.value("fettle_texts", family="fake", variant="ref", finish="length") == 1
    assert seen.value("fettle_attempts_given_up", family="fake", variant="small") == 1
    assert seen.value("fettle_replicas", family="fake", variant="small") == 2
    assert seen.value("fettle_replica_starts", family="fake", variant="small") == 3
    assert seen.value("fettle_replicas_most", family="fake", variant="small") == 3
    assert seen.value("fettle_batch_rows_count", family="fake", variant="ref") >= 1
    assert seen.value("fettle_batch_rows_sum", family="fake", variant="ref") == 2
    assert seen.value("fettle_request_seconds_count", family="fake", **{"class": "exact"}) == 1
    assert seen.value("fettle_time_to_first_token_seconds_sum", family="fake", variant="ref") == pytest.approx(0.03)
    assert seen.value("fettle_ready", family="fake") == 1
    assert seen.value("fettle_gears", family="fake", **{"class": "5 %"}) == 1
    assert seen.value("fettle_monitor_age_seconds") == 0
    assert all(math.isfinite(value) for value in seen.values.values())
    assert seen.names <= {part.name for metric in METRICS for part in (*metric.parts, metric)}


def state_of(**changes: object) -> PointState:
    state = PointState("f", "within-0.01", "mark", 0.01, 0.0097, 1000, 3, 200, 2, 0.5, 100.0, "watched", None, None)
    return replace(state, **changes)


@pytest.mark.parametrize(
    ("changes", "evidence", "revoked"),
    [
        ({}, math.log10(0.5), 0.0),
        ({"evidence": 250.0, "status": "revoked"}, math.log10(250), 1.0),
        ({"evidence": 0.0}, LEAST_EVIDENCE, 0.0),
    ],
)
def test_the_monitor_tells_what_speaks_against_a_point(changes, evidence, revoked):
    seen = Recorder()
    tell_points([state_of(**changes)], Exporter(seen.instrument))
    labels = {"family": "f", "point": "within-0.01"}
    assert seen.value("fettle_evidence", **labels) == pytest.approx(evidence)
    assert seen.value("fettle_alarm_evidence", **labels) == 2
    assert seen.value("fettle_point_revoked", **labels) == revoked
    assert seen.names == {metric.name for metric in METRICS if metric.told == "monitor"}


@pytest.mark.anyio
async def test_errors_are_counted_at_the_border(tmp_path):
    from tests.inprocess import client_of

    app = make_app([make_fake_family(tmp_path / "f")])
    async with client_of(app) as client:
        await client.post("/classify", json={"input": "fox", "model": "none"})
        await client.post("/classify", content=b"{", headers={"content-type": "application/json"})
        await client.post("/classify", json={"input": "fox"})
        await client.get("/nowhere")
    assert app.journal.errors == {(404, "model_not_found"): 1, (400, "invalid_request"): 1, (404, "http"): 1}
