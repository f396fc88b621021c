"""Traces: spans over router, queue and replica, below the client's own, of what is sampled; and OTLP as it is sent."""

from __future__ import annotations

import time
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.api import build_api
from deployments.tickets import Ticket, traces_of
from deployments.tracing import Tracer, at_replica, open_tracer
from fettle.config import TracingConfig
from fettle.rows import Exits, Outputs, Rows
from tests.collector import collector, spans_of
from tests.fakes import FakeVariant, make_fake_family, make_point, make_step, token_id
from tests.inprocess import EngineSlots, client_of, make_router, slots_of

pytestmark = pytest.mark.anyio
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def family(tmp_path):
    variants = [FakeVariant("ref", fail_on_token=token_id("poison")), FakeVariant("small", salt=1)]
    # Nothing is ever sure enough for the first step.
    point = make_point("within-0.05", 0.05, make_step("small", 0.9999), make_step("ref"))
    return make_fake_family(tmp_path / "f", variants=variants, points=[point])


def app_of(family, spans: InMemorySpanExporter, share: float = 1.0):
    router = make_router([family])
    return build_api(router, tracer=Tracer(SimpleSpanProcessor(spans), share)), router


async def ask(app, input: Any = "fox", level: Any = 0.05, **headers: str):
    async with client_of(app) as client:
        return await client.post("/classify", json={"input": input, "max_disagreement": level}, headers=headers)


def by_name(spans: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


async def test_a_request_is_a_tree_of_spans(family, spans):
    app, _ = app_of(family, spans)
    assert (await ask(app, **{"x-request-id": "mine"})).status_code == 200
    found = by_name(spans)
    [root] = found["POST /classify"]
    assert root.parent is None
    told = {"request_id": "mine", "family": "fake", "class": "0.05", "point": "within-0.05"}
    assert root.attributes is not None
    assert root.attributes.items() >= (told | {"http.response.status_code": 200}).items()
    assert [step.attributes["variant"] for step in found["step"]] == ["small", "ref"]
    assert [parent_of(span) for span in (*found["tokenize"], *found["step"])] == [root.context.span_id] * 3
    for name in ("queue", "inference"):
        assert [parent_of(span) for span in found[name]] == [step.context.span_id for step in found["step"]]
    assert len({span.context.trace_id for span in spans.get_finished_spans()}) == 1


async def test_times_are_in_order(family, spans):
    app, _ = app_of(family, spans)
    await ask(app)
    found = by_name(spans)
    [root], [tokenize], steps = found["POST /classify"], found["tokenize"], found["step"]
    assert root.start_time <= tokenize.end_time <= steps[0].start_time <= steps[0].end_time <= steps[1].start_time
    assert steps[1].end_time <= root.end_time
    for step, queue, inference in zip(steps, found["queue"], found["inference"], strict=True):
        assert step.start_time <= queue.start_time <= queue.end_time == inference.start_time
        assert inference.end_time == step.end_time
    assert all(span.start_time <= span.end_time for span in spans.get_finished_spans())


async def test_a_clients_trace_goes_on(family, spans):
    app, _ = app_of(family, spans, share=0.0)
    await ask(app)
    assert not spans.get_finished_spans()
    await ask(app, traceparent=PARENT)
    [root] = by_name(spans)["POST /classify"]
    assert root.context.trace_id == int(PARENT.split("-")[1], 16)
    assert parent_of(root) == int(PARENT.split("-")[2], 16)


@pytest.mark.parametrize("header", [PARENT[:-1] + "0", "nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", ""])
async def test_what_a_client_did_not_sample_is_not(family, spans, header):
    app, _ = app_of(family, spans, share=0.0)
    assert (await ask(app, traceparent=header)).status_code == 200
    assert not spans.get_finished_spans()


async def test_a_failure_is_seen_in_the_trace(family, spans):
    app, _ = app_of(family, spans)
    assert (await ask(app, "the poison", "exact")).status_code == 500
    [root] = by_name(spans)["POST /classify"]
    assert root.attributes["http.response.status_code"] == 500
    assert not root.status.is_ok
    assert len(by_name(spans)["step"]) == len(by_name(spans)["queue"]) == 1
    assert "inference" not in by_name(spans)


async def test_no_text_and_no_key_is_in_a_span(family, spans):
    app, _ = app_of(family, spans)
    await ask(app, "quick brown", authorization="Bearer a-secret")
    said = " ".join(span.to_json() for span in spans.get_finished_spans())
    assert "POST /classify" in said
    for secret in ("quick", "brown", "secret"):
        assert secret not in said


class TracedSlots(EngineSlots):
    """Notes which spans a batch came with."""

    async def run(self, rows: Rows, exits: Exits | None, *traces: str) -> Outputs:
        self.traces = [*getattr(self, "traces", []), traces]
        return await super().run(rows, exits)


async def test_a_batch_brings_the_spans_of_its_traced_rows_to_the_replica(family, spans):
    app, router = app_of(family, spans)
    slots = slots_of(router, "fake", "ref")
    own = router.families["fake"].batchers["ref"].slots = TracedSlots(slots.engine)
    await ask(app, ["fox", "brown"], "exact")
    [step] = by_name(spans)["step"]
    [traces] = own.traces
    assert [int(trace.split("-")[2], 16) for trace in traces] == [step.context.span_id]
    assert traces_of([]) == ()
    assert Ticket.__slots__.count("trace") == 1


def test_the_replicas_own_span_is_below_the_step(spans):
    tracer = Tracer(SimpleSpanProcessor(spans), 0.0)
    with at_replica(tracer, [PARENT, PARENT[:-1] + "0"], {"batch_rows": 3}) as found:
        time.sleep(0.002)
        found["infer_ms"] = 1.5
    [span] = spans.get_finished_spans()
    assert parent_of(span) == int(PARENT.split("-")[2], 16)
    assert dict(span.attributes) == {"batch_rows": 3, "infer_ms": 1.5}
    assert span.end_time - span.start_time >= 2e6
    with at_replica(None, [PARENT], {}):
        pass
    assert len(spans.get_finished_spans()) == 1


def test_without_an_endpoint_there_is_no_tracer():
    assert open_tracer(TracingConfig()) is None


async def test_spans_arrive_at_the_endpoint(family):
    with collector() as (url, got):
        tracer = open_tracer(TracingConfig(endpoint=url, share=1.0))
        assert tracer is not None
        app = build_api(make_router([family]), tracer=tracer)
        await ask(app)
        assert tracer.provider.force_flush()
        tracer.provider.shutdown()
    spans = spans_of(got)
    assert {span.name for span in spans} == {"POST /classify", "tokenize", "step", "queue", "inference"}
    [resource] = {
        attribute.value.string_value
        for request in got
        for each in request.resource_spans
        for attribute in each.resource.attributes
        if attribute.key == "service.name"
    }
    assert resource == "fettle"
