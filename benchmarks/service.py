"""Fettle's service from a whole `ServeConfig`, as a process that the keeper can hold: what no option of `serve` says.

    python -m benchmarks.service CONFIG_JSON PORT

Stops on SIGINT or SIGTERM. `spec` says how to start it and where it answers.
"""

from __future__ import annotations

import json
import sys

from benchmarks.processes import ServerSpec
from deployments.server import ServerOptions, running, wait_for_signal
from fettle.config import ServeConfig


def spec(config: ServeConfig, port: int, path: str, model: str, key: str | None = None) -> ServerSpec:
    """`path` and `model` are what the requests are for; `key` is needed where the configuration has keys."""
    return ServerSpec(
        command=[sys.executable, "-m", "benchmarks.service", to_json(config), str(port)],
        url=f"http://127.0.0.1:{port}{path}",
        probe=json.dumps({"model": model, "input": "Are you there?"}).encode(),
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
    )


def to_json(config: ServeConfig) -> str:
    return config.model_dump_json()


def main() -> None:
    config = ServeConfig.model_validate_json(sys.argv[1])
    with running(config, ServerOptions(port=int(sys.argv[2]), dashboard=False)):
        wait_for_signal()


if __name__ == "__main__":
    main()
