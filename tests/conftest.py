"""What all tests share: how hypothesis behaves, and the one service on Ray that the tests of a service talk to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from xdist.scheduler import LoadScopeScheduling

from fettle.config import BatchConfig, FamilyConfig, LimitConfig, ReplicaConfig, ServeConfig, TracingConfig
from tests.collector import collector
from tests.fakes import FakeVariant, classify_task, embed_task, make_fake_family, token_id
from tests.integration.service import Service, service
from tests.texts import make_text_family

# The same examples in every run and no deadline: on a busy machine a slow example says nothing about the code.
settings.register_profile(
    "fettle",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fettle")

# Milliseconds of the fake engines. `slow` answers 49 rows of 20 tokens a second on its two replicas.
VARIANTS = {
    "sections": [
        FakeVariant("fp32", ms_per_call=3, ms_per_token=0.05),
        FakeVariant("fragile", ms_per_call=3, ms_per_token=0.02, exit_on_token=token_id("crash")),
    ],
    "emb": [FakeVariant("int8", ms_per_call=2, ms_per_token=0.02), FakeVariant("slow", ms_per_call=5, ms_per_token=2)],
}
MAX_QUEUE_S = 1.0
BODY_WITHIN_S = 12.0
TASKS = {"sections": classify_task(), "emb": embed_task(16)}
TEXT_VARIANTS = [FakeVariant("bf16", ms_per_call=5), FakeVariant("int4", ms_per_call=2)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """For `-n`: what uses a service on Ray stays in one process; of unit tests, a file's stay together."""
    # The services take longest, so they go first, and not by how many tests there are.
    config.option.loadscopereorder = False
    return ByService(config, log)


class ByService(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return path if path.startswith("tests/unit/") else "service"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def traces_endpoint() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    with collector() as found:
        yield found


@pytest.fixture(scope="session")
def one_service(
    tmp_path_factory: pytest.TempPathFactory, traces_endpoint: tuple[str, list[ExportTraceServiceRequest]]
) -> Iterator[Service]:
    where = tmp_path_factory.mktemp("service")
    for name, variants in VARIANTS.items():
        make_fake_family(where / name, name=name, task=TASKS[name], variants=variants)
    make_text_family(where / "lm", variants=TEXT_VARIANTS)
    families = [
        FamilyConfig(path=str(where / name), variants=[variant.id for variant in variants])
        for name, variants in {**VARIANTS, "lm": TEXT_VARIANTS}.items()
    ]
    config = ServeConfig(
        families=families,
        replicas=ReplicaConfig(min_replicas=2, max_replicas=2),
        batch=BatchConfig(max_queue_s=MAX_QUEUE_S),
        # Only what comes with a sampled trace is traced.
        tracing=TracingConfig(endpoint=traces_endpoint[0], share=0.0),
        limits=LimitConfig(body_within_s=BODY_WITHIN_S),
    )
    with service(config, where / "log") as running:
        yield running


@pytest.fixture
def served(one_service: Service, request: pytest.FixtureRequest) -> Iterator[Service]:
    """The running service; what it said is shown beside a test that fails."""
    start = one_service.log.stat().st_size
    yield one_service
    said = one_service.log.read_text(errors="replace")[start:]
    if said:
        print(f"the service said:\n{said[-4000:]}")
