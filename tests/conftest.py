"""What all tests share: how hypothesis behaves, and the services that the Ray tests talk to."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run and no deadline: on a busy machine a slow example says nothing about the code.
settings.register_profile(
    "fettle",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fettle")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
