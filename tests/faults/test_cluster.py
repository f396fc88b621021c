"""A cluster of hosts with networks of their own, faults in it under load: no request is lost, or answered twice.

pytest -m long tests/faults/test_cluster.py        (root; Redis; a quarter of an hour)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.cluster import Cluster
from benchmarks.hosts import Network, why_not

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

RATE, LATE_S = 10.0, 5.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    directory: Path = tmp_path_factory.mktemp("cluster")
    with Network(directory / "hosts", subnet="10.217.62") as network:
        made = Cluster(network, directory)
        config = faults.settings(faults.family(directory))
        made.start(faults.WORKERS)
        made.deploy(config)
        yield made


@pytest.mark.parametrize("name", list(faults.FAULTS))
def test_no_request_is_lost_or_answered_twice(cluster: Cluster, tmp_path: Path, name: str):
    report = faults.measure(cluster, faults.FAULTS[name], tmp_path / "book.jsonl", RATE, LATE_S)
    print(report)
    assert report["sent"] > 0
    assert report["others"] == {}
    assert report["twice"] == 0
    assert report["wrong"] == 0
