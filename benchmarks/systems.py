"""The systems under comparison: how each is started, where it answers, what its model is called there.

Vectors are asked for as OpenAI has them, labels as vLLM has them (`/classify`), which Infinity takes too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.peers import infinity
from benchmarks.processes import ServerSpec

Task = Literal["embed", "classify"]

PATHS: dict[Task, str] = {"embed": "/v1/embeddings", "classify": "/classify"}
ALL_PEERS = ("plain", *(f"infinity-{name}" for name in infinity.SETTINGS))
PEERS = ("plain", *(f"infinity-{name}" for name in infinity.FASTEST))
# Serve's start fails on a busy small machine without the first two; the last keeps a benchmark to itself.
PLAIN_ENVIRONMENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, slots=True)
class System:
    """`server` makes the specification for a port; `model` is what a request calls the model.

    `variant` is set for a system of ours, and None for a peer.
    """

    name: str
    model: str
    server: Callable[[int], ServerSpec]
    variant: str | None = None

    @property
    def is_peer(self) -> bool:
        return self.variant is None


def peer_system(name: str, model: Path, peer_env: Path, task: Task = "embed") -> System:
    """A peer by its name in `ALL_PEERS`; Infinity's environment and model files are made first if they are missing."""
    if name == "plain":
        return System(name, "minilm", lambda port: _plain(model, port, task))
    setting = infinity.SETTINGS[name.removeprefix("infinity-")]
    infinity.make_environment(peer_env)
    prepared = infinity.prepare_model(
        peer_env, setting, model, infinity.EMBED if task == "embed" else infinity.CLASSIFY
    )
    return System(name, infinity.SERVED_NAME, lambda port: _infinity(peer_env, setting, prepared, port, task))


def fettle_system(family: Path, family_name: str, variant: str, cores: int) -> System:
    """`fettle serve` with one variant, pinned, one single-threaded replica for each core."""
    model = f"{family_name}:{variant}"

    def server(port: int) -> ServerSpec:
        command = [sys.executable, "-m", "fettle.cli", "serve", str(family.absolute()), "--port", str(port)]
        command += ["--variant", variant, "--default", variant, "--threads", "1", "--no-dashboard"]
        command += ["--min-replicas", str(cores), "--max-replicas", str(cores)]
        return _spec(command, port, "/v1/embeddings", model)

    return System(f"fettle {variant}", model, server, variant)


def _plain(model: Path, port: int, task: Task) -> ServerSpec:
    command = [sys.executable, "-m", "benchmarks.peers.plain_serve", "--model", str(model), "--task", task]
    return _spec([*command, "--port", str(port)], port, PATHS[task], "minilm", PLAIN_ENVIRONMENT)


def _infinity(peer_env: Path, setting: infinity.Setting, prepared: Path, port: int, task: Task) -> ServerSpec:
    command = infinity.command(peer_env, setting, prepared, port, _infinity_task(task))
    path = "/embeddings" if task == "embed" else "/classify"
    # It takes a list of texts to classify, and a single text to embed.
    probe = _probe(infinity.SERVED_NAME, ["Are you there?"] if task == "classify" else "Are you there?")
    environment = infinity.environment(peer_env, setting)
    return ServerSpec(command, f"http://127.0.0.1:{port}{path}", probe, environment)


def _infinity_task(task: Task) -> str:
    return infinity.EMBED if task == "embed" else infinity.CLASSIFY


def _spec(
    command: Sequence[str], port: int, path: str, model: str, environment: dict[str, str] | None = None
) -> ServerSpec:
    return ServerSpec(command, f"http://127.0.0.1:{port}{path}", _probe(model, "Are you there?"), environment or {})


def _probe(model: str, content: str | list[str]) -> bytes:
    return json.dumps({"model": model, "input": content}).encode()
