"""Updates under load on real Ray: no request fails, no stream breaks, and a bad version goes by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rollout import REPLICAS, broken_promises, run

pytestmark = [pytest.mark.long, pytest.mark.anyio, pytest.mark.timeout(1500)]


async def test_a_service_is_updated_and_bad_versions_go_while_it_answers(tmp_path: Path):
    phases = await run(tmp_path)
    assert broken_promises(phases) == []
    settings, version, *rollouts = phases
    assert all(phase.requests and phase.streams for phase in phases)
    # One replica more at a time where the models stay, and both versions whole where they change. Of a replica that
    # stops a process may be there a moment longer, at both variants.
    assert settings.most_replicas["sections"] <= 2 * (REPLICAS + 1) + 2
    assert all(phase.most_replicas["sections"] <= 2 * 2 * REPLICAS + 2 for phase in (version, *rollouts))
