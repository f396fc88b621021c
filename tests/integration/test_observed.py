"""What operators see of a service on Ray: metrics at Ray's agent, the log, and traces with the replica's own span."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from deployments.metrics import METRICS
from tests.collector import spans_of
from tests.integration.service import Service, command, wait_until

pytestmark = pytest.mark.slow
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
# Ray's processes tell their agent every 10 s; the exporter sends spans every 5 s.
PATIENCE_S = 60.0


def exposed(served: Service) -> str:
    """All that Ray's agents of this service show."""
    found = httpx.get(f"{served.dashboard}/api/prometheus/sd", timeout=30).json()
    targets = [target for group in found for target in group["targets"]]
    return "".join(httpx.get(f"http://{target}/metrics", timeout=30).text for target in targets)


def session_logs(served: Service) -> Path:
    """Serve's logs, by the session that Ray's processes name."""
    names = [re.search(r"/[^ ]*/session_[0-9_-]+", command(process)) for process in served.descendants()]
    return Path(next(name[0] for name in names if name is not None)) / "logs" / "serve"


def lines(served: Service) -> list[dict]:
    texts = [path.read_text(errors="replace") for path in session_logs(served).glob("replica_*RouterIngress*.log")]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_metrics_of_routers_replicas_and_the_monitor_reach_rays_agents(served: Service):
    body = {"model": "lm:bf16", "prompt": "hello", "max_tokens": 4}
    assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert httpx.post(f"{served.url}/classify", json={"model": "sections", "input": "fox"}, timeout=60).is_success
    assert httpx.post(f"{served.url}/classify", json={"model": "none", "input": "fox"}, timeout=60).status_code == 404
    wanted = [
        r'ray_fettle_requests_total\{[^}]*class="pinned"[^}]*family="lm"[^}]*\} [1-9]',
        r'ray_fettle_rows_total\{[^}]*family="sections"[^}]*\} [1-9]',
        r'ray_fettle_errors_total\{[^}]*code="model_not_found"[^}]*\} [1-9]',
        r'ray_fettle_request_seconds_bucket_total\{[^}]*family="sections"[^}]*le="\+Inf"[^}]*\} [1-9]',
        r'ray_fettle_replicas\{[^}]*family="emb"[^}]*variant="int8"[^}]*\} 2',
        r'ray_fettle_decoded_tokens_total\{[^}]*family="lm"[^}]*variant="bf16"[^}]*\} [1-9]',
        r"ray_fettle_router_cpu_seconds_total\{[^}]*\} [1-9]",
        r"ray_fettle_info\{[^}]*\} 1",
    ]
    shown = ""

    def all_there() -> bool:
        nonlocal shown
        shown = exposed(served)
        return all(re.search(pattern, shown) for pattern in wanted)

    there = wait_until(all_there, PATIENCE_S)
    assert there, [pattern for pattern in wanted if not re.search(pattern, shown)]
    known = {name for metric in METRICS for name in metric.series}
    assert set(re.findall(r"^(ray_fettle_\w+)", shown, re.MULTILINE)) <= known


def test_a_request_keeps_its_id_in_the_reply_and_in_the_log(served: Service):
    id = "integration-7"
    body, headers = {"model": "sections:none", "input": "fox"}, {"x-request-id": id}
    reply = httpx.post(f"{served.url}/classify", json=body, headers=headers, timeout=60)
    assert (reply.status_code, reply.headers["x-request-id"]) == (404, id)

    def told() -> bool:
        return any(line.get("request_id") == id for line in lines(served))

    assert wait_until(told, PATIENCE_S)
    [line] = [line for line in lines(served) if line.get("request_id") == id]
    assert (line["code"], line["status"], line["path"]) == ("model_not_found", 404, "/classify")
    assert line["message"] == reply.json()["error"]["message"]


def test_a_request_without_an_id_is_given_one(served: Service):
    reply = httpx.post(f"{served.url}/classify", json={"model": "sections", "input": "fox"}, timeout=60)
    assert len(reply.headers["x-request-id"]) >= 32


def test_a_clients_trace_goes_on_to_the_replicas(served: Service, traces_endpoint):
    got = traces_endpoint[1]
    headers = {"traceparent": PARENT}
    body = {"model": "sections:fp32", "input": ["fox", "quick"]}
    assert httpx.post(f"{served.url}/classify", json=body, headers=headers, timeout=60).is_success
    text = {"model": "lm:int4", "prompt": "hello", "max_tokens": 4}
    assert httpx.post(f"{served.url}/v1/completions", json=text, headers=headers, timeout=60).is_success

    def spans() -> dict[bytes, Span]:
        return {span.span_id: span for span in spans_of(got) if span.trace_id.hex() == TRACE}

    def names() -> Counter[str]:
        return Counter(span.name.split()[0] for span in spans().values())

    # From three processes: the router and two replicas.
    assert wait_until(lambda: names() >= Counter(POST=2, step=2, replica=2), PATIENCE_S), names()
    found = spans()
    for replica in (span for span in found.values() if span.name == "replica"):
        step = found[replica.parent_span_id]
        root = found[step.parent_span_id]
        assert (step.name, root.name[:5], root.parent_span_id.hex()) == ("step", "POST ", PARENT.split("-")[2])
        # By the one clock of this machine.
        assert step.start_time_unix_nano <= replica.start_time_unix_nano <= step.end_time_unix_nano
