"""Where hosts cannot have networks of their own: Ray's several nodes on one machine, for the faults that they allow.

Has what `benchmarks.faults` asks of a `Cluster`. A node can be killed or added, and a replica stall or freeze; no cable
can be cut, and there is no head to kill, since this process is its driver. One HAProxy, on the head.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cluster import HTTP_PORT, PLACES, fast_path
from benchmarks.processes import REPLICA, title_of
from deployments import fastpath
from fettle.config import ServeConfig

FAULTS = ("kill", "add", "stall", "freeze")


@dataclass(slots=True)
class Node:
    """One raylet and what it started."""

    name: str
    ray_node: Any
    cluster: Any
    address: str = "127.0.0.1"
    is_up: bool = True

    def kill(self) -> None:
        self.is_up = False
        self.cluster.remove_node(self.ray_node, allow_graceful=False)

    def processes(self, title: str = "") -> list[psutil.Process]:
        found = []
        for started in self.ray_node.all_processes.values():
            for process in started:
                if process.process.poll() is None:
                    found += psutil.Process(process.process.pid).children(recursive=True)
        return [process for process in found if title_of(process).startswith(title)]


@dataclass(slots=True)
class OneNetwork:
    """See the module."""

    directory: Path
    hosts: dict[str, Node] = field(default_factory=dict)
    workers: list[str] = field(default_factory=list)
    _cluster: Any = None

    @property
    def network(self) -> OneNetwork:
        return self

    @property
    def head(self) -> Node:
        return self.hosts["head"]

    def host(self, name: str) -> Node:
        return self.hosts[name]

    def start(self, workers: int) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.hosts["head"] = Node("head", self._cluster.head_node, self._cluster)
        for _ in range(workers):
            self.add_worker()

    def add_worker(self) -> Node:
        node = Node(f"worker{len(self.workers) + 1}", self._cluster.add_node(num_cpus=PLACES), self._cluster)
        self.hosts[node.name] = node
        self.workers.append(node.name)
        return node

    def deploy(self, config: ServeConfig) -> None:
        """Returns when all is up."""
        import ray
        from ray import serve

        from deployments.app import build

        ray.init(address=self._cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": HTTP_PORT})
        serve.run(build(config), name="fettle", route_prefix="/")

    def replicas(self, host: Node, deployment: str = "") -> list[int]:
        return [process.pid for process in host.processes(f"{REPLICA}{deployment}")]

    def placed(self) -> dict[str, dict[str, int]]:
        """By node, how many replicas of each deployment run there, whatever its version, as Serve says."""
        from ray.serve.context import _get_global_client

        found: dict[str, dict[str, int]] = {name: {} for name in self.hosts}
        names = {node.ray_node.node_id: name for name, node in self.hosts.items()}
        details = _get_global_client().get_serve_details()
        for name, deployment in details["applications"]["fettle"]["deployments"].items():
            for replica in deployment["replicas"]:
                if replica["state"] == "RUNNING" and replica["node_id"] in names:
                    there = found[names[replica["node_id"]]]
                    short = name.partition("@")[0]
                    there[short] = there.get(short, 0) + 1
        return found

    def stop(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def started(directory: Path, config: ServeConfig, workers: int) -> Iterator[OneNetwork]:
    """The nodes with the service on them while the block runs."""
    with tempfile.TemporaryDirectory(prefix="fettle-") as scratch:
        # Ports and paths of its own, as `fettle serve` has, and a token for nobody.
        os.environ.update(fast_path() | dict(fastpath.environment(Path(scratch), fast=True, cores=2)))
        os.environ["RAY_AUTH_MODE"] = "disabled"
        made = OneNetwork(directory)
        made.start(workers)
        try:
            made.deploy(config)
            yield made
        finally:
            made.stop()
