"""A Ray cluster over the hosts of `benchmarks.hosts`, started as cluster.yaml does, with the service of deploy/ on it.

A head without replicas, workers, and a store (Redis) that the head's tables outlive it in. Sends no load.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.hosts import Host, HostError, Network, wait_for
from benchmarks.processes import REPLICA
from fettle.config import ServeConfig

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
HTTP_PORT, GCS_PORT, REDIS_PORT, DASHBOARD_PORT = 8000, 6379, 6380, 8265
PLACES = 8
START_S, DEPLOY_S = 240.0, 400.0
# Where workers have nothing to do but wait for the head, they wait: ten minutes, as KubeRay has it.
PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}


@dataclass(slots=True)
class Cluster:
    """See the module. `network` is up; `start` brings up the head, the store and the workers."""

    network: Network
    directory: Path
    workers: list[str] = field(default_factory=list)
    _fast: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Host:
        return self.network.hosts["head"]

    def host(self, name: str) -> Host:
        return self.network.hosts[name]

    def start(self, workers: int) -> None:
        self._fast = fast_path() | PATIENT
        home = self.directory / "home"
        (home / ".ray").mkdir(parents=True, exist_ok=True)
        token = home / ".ray" / "auth_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.network.add("store")
        self.start_store()
        self.network.add("head")
        self.start_head()
        for _ in range(workers):
            self.add_worker()

    def start_store(self) -> None:
        """Redis, on a host that is up, with what was on its disk."""
        disk = self.directory / "redis"
        disk.mkdir(exist_ok=True)
        self.host("store").run(
            [
                *("redis-server", "--port", str(REDIS_PORT), "--bind", "0.0.0.0", "--protected-mode", "no"),
                *("--dir", str(disk), "--appendonly", "yes", "--daemonize", "yes"),
            ]
        )

    def start_head(self) -> None:
        """The head's Ray, on a host that is up; it finds the tables of the one before it in the store."""
        redis = {"RAY_REDIS_ADDRESS": f"{self.host('store').address}:{REDIS_PORT}"}
        command = ["start", "--head", f"--port={GCS_PORT}", "--dashboard-host=0.0.0.0", "--num-cpus=0"]
        self._ray(self.head, command, redis)

    def restart_head(self) -> None:
        """An empty host in the place of the head's, with a new Ray on it."""
        self.head.kill()
        self.head.boot()
        self.start_head()

    def add_worker(self) -> Host:
        """A new host that joins; returns when its raylet is up."""
        host = self.network.add(f"worker{len(self.workers) + 1}")
        self.workers.append(host.name)
        self.join(host)
        return host

    def join(self, host: Host) -> None:
        self._ray(host, ["start", f"--address={self.head.address}:{GCS_PORT}", f"--num-cpus={PLACES}"], {})

    def run(self, host: Host, *command: str, timeout_s: float = 180.0) -> str:
        """A command of Ray's or Serve's own on a host. Raises HostError."""
        return host.run([str(BIN / command[0]), *command[1:]], self._environment(host), timeout_s)

    def deploy(self, config: ServeConfig) -> float:
        """`serve deploy`, and the seconds until every deployment is healthy. Raises HostError."""
        file = self.directory / "serve.yaml"
        file.write_text(yaml.safe_dump(service_file(config)))
        self.run(self.head, "serve", "deploy", str(file), "--address", f"http://127.0.0.1:{DASHBOARD_PORT}")
        return wait_for(self.is_running, DEPLOY_S, "the service is up")

    def is_running(self) -> bool:
        return self.status() == "RUNNING"

    def status(self) -> str:
        """Of the application, or why it cannot be told."""
        try:
            return str(self.details()["applications"]["fettle"]["status"])
        except (urllib.error.URLError, OSError, KeyError) as error:
            return f"{type(error).__name__}: {error}"

    def details(self) -> dict[str, Any]:
        """What Serve's REST interface says. Raises URLError, OSError."""
        return self.ask("/api/serve/applications/")

    def ask(self, path: str) -> dict[str, Any]:
        """Of the dashboard. Raises URLError, OSError."""
        token = (self.directory / "home" / ".ray" / "auth_token").read_text()
        request = urllib.request.Request(f"http://{self.head.address}:{DASHBOARD_PORT}{path}")
        request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=10) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def replicas(self, host: Host, deployment: str = "") -> list[int]:
        """Process numbers of the replicas on a host, of one deployment where it is named."""
        return [process.pid for process in host.processes(f"{REPLICA}{deployment}")]

    def placed(self) -> dict[str, dict[str, int]]:
        """By host, how many replicas of each deployment run there, whatever its version, as Serve says."""
        found: dict[str, dict[str, int]] = {name: {} for name in self.network.hosts}
        names = {host.address: name for name, host in self.network.hosts.items()}
        for name, deployment in self.details()["applications"]["fettle"]["deployments"].items():
            for replica in deployment["replicas"]:
                if replica["state"] == "RUNNING" and replica["node_ip"] in names:
                    there = found[names[replica["node_ip"]]]
                    short = name.partition("@")[0]
                    there[short] = there.get(short, 0) + 1
        return found

    def _ray(self, host: Host, command: list[str], more: Mapping[str, str]) -> None:
        options = [f"--node-ip-address={host.address}", "--object-store-memory=100000000", "--disable-usage-stats"]
        self.run_with(host, [str(BIN / "ray"), *command, *options], more)

    def run_with(self, host: Host, command: list[str], more: Mapping[str, str]) -> None:
        said = host.run(command, {**self._environment(host), **more}, START_S)
        if "Ray runtime started" not in said:
            raise HostError(f"{host.name}: {said[-2000:]}")

    def _environment(self, host: Host) -> dict[str, str]:
        return {
            **self._fast,
            "HOME": str(self.directory / "home"),
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": f"{self.head.address}:{GCS_PORT}" if host is not self.head else "",
        }


def fast_path() -> dict[str, str]:
    """What cluster.yaml exports before `ray start`."""
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["worker_start_ray_commands"]
    (command,) = [command for command in commands if "ray start" in command]
    words = shlex.split(command.partition(";")[0].replace("export", "", 1))
    return dict(word.split("=", 1) for word in words)


def service_file(config: ServeConfig) -> dict[str, Any]:
    """deploy/serve.yaml, as it says itself for a cluster behind a load balancer, with these arguments."""
    file: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    file["proxy_location"] = "EveryNode"
    file["http_options"]["host"] = "0.0.0.0"
    file["applications"][0]["args"] = config.model_dump(mode="json", exclude_defaults=True)
    return file
