"""Fettle's service from a whole `ServeConfig`, as a process that the keeper can hold: what no option of `serve` says.

    python -m benchmarks.service CONFIG_JSON PORT

Stops on SIGINT or SIGTERM. `spec` says how to start it and where it answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.processes import ServerSpec
from deployments.server import ServerOptions, running, wait_for_signal
from fettle.config import FamilyConfig, GearConfig, MonitorConfig, ReplicaConfig, ServeConfig


def config(
    family: Path, replicas: int, evidence: Path, *, objective_ms: float = 100.0, share: float = 0.01, **more: Any
) -> ServeConfig:
    """One family on a fixed number of single-threaded replicas of each variant; `more` are fields of `ServeConfig`.

    The monitor's evidence goes into a directory of the benchmark's own: what was measured here is no production.
    """
    return ServeConfig(
        families=[FamilyConfig(path=str(family))],
        replicas=ReplicaConfig(min_replicas=replicas, max_replicas=replicas),
        gears=GearConfig(objective_ms=objective_ms),
        monitor=MonitorConfig(directory=str(evidence.absolute()), share=share),
        **more,
    )


def spec(settings: ServeConfig, port: int, path: str, model: str, key: str | None = None) -> ServerSpec:
    """`path` and `model` are what the requests are for; `key` is needed where the configuration has keys."""
    return ServerSpec(
        command=[sys.executable, "-m", "benchmarks.service", settings.model_dump_json(), str(port)],
        url=f"http://127.0.0.1:{port}{path}",
        probe=json.dumps({"model": model, "input": "Are you there?"}).encode(),
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
    )


def main() -> None:
    settings = ServeConfig.model_validate_json(sys.argv[1])
    with running(settings, ServerOptions(port=int(sys.argv[2]), dashboard=False)):
        wait_for_signal()


if __name__ == "__main__":
    main()
