"""A service on Ray as a process of its own, so that the tests' process has neither Ray nor its environment.

    python -m tests.integration.service CONFIG PORT

CONFIG is a `ServeConfig` in JSON. Prints one line of JSON with the dashboard's address when the service is up, and
stops on SIGINT or SIGTERM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from deployments.fastpath import free_port
from fettle.config import ServeConfig

ROOT = Path(__file__).parents[2]
READY = "ready: "
START_S = 180.0
STOP_S = 60.0
KEPT = [sys.executable, "-m", "benchmarks.keeper"]


@dataclass(frozen=True)
class Service:
    """A running one. `process` is the root of all its processes."""

    url: str
    port: int
    dashboard: str
    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of one deployment's replicas, by the title that Ray gives them."""
        title = f"ray::ServeReplica:fettle:{deployment}"
        return [process for process in self.descendants() if command(process).startswith(title)]

    def info(self, family: str, variant: str) -> dict[str, float]:
        """What `/info` says about a variant."""
        families = httpx.get(f"{self.url}/info", timeout=30).json()["families"]
        variants = next(found["variants"] for found in families if found["name"] == family)
        return next(found for found in variants if found["id"] == variant)


@contextmanager
def service(config: ServeConfig, log: Path, *, kept: bool = True) -> Iterator[Service]:
    """Start a service, and end all its processes afterwards.

    Args:
        kept: under the keeper, which holds on to every descendant; without it the process is the service itself.
    """
    port = free_port()
    command = [sys.executable, "-m", "tests.integration.service", config.model_dump_json(), str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*KEPT, *command] if kept else command,
            cwd=ROOT,
            # Whatever this machine's user has set up: the tests ask the dashboard without a token.
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    seen: set[psutil.Process] = set()
    try:
        up = _wait_until_up(process, log)
        running = Service(f"http://127.0.0.1:{port}", port, up["dashboard"], process, log, up["address"])
        seen.update(running.descendants())
        yield running
    finally:
        _end(process, seen)


def wait_until(true: Callable[[], bool], within_s: float) -> bool:
    """Ask again and again; whether it became true in time."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def command(process: psutil.Process) -> str:
    """The process's title; empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _wait_until_up(process: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        ready = next((line for line in text.splitlines() if line.startswith(READY)), None)
        if ready is not None:
            up: dict[str, str] = json.loads(ready.removeprefix(READY))
            return up
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with status {process.returncode}:\n{text[-4000:]}")
        time.sleep(0.1)
    raise RuntimeError(f"the service was not up in {START_S:g} s:\n{log.read_text(errors='replace')[-4000:]}")


def _end(process: subprocess.Popen[bytes], seen: set[psutil.Process]) -> None:
    if process.poll() is None:
        seen.update(psutil.Process(process.pid).children(recursive=True))
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # `is_running` knows a process number that was given to another process since.
    for left in [each for each in seen if each.is_running()]:
        left.kill()


def main() -> None:
    import ray

    from deployments.server import ServerOptions, running, wait_for_signal

    config = ServeConfig.model_validate_json(sys.argv[1])
    with running(config, ServerOptions(port=int(sys.argv[2]))):
        dashboard = ray._private.worker.get_dashboard_url()
        address = ray.get_runtime_context().gcs_address
        print(READY + json.dumps({"dashboard": f"http://{dashboard}", "address": address}), flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()
