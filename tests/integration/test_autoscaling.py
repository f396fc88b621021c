"""Replicas come with the load and go without it, and no request is lost on the way. A Ray of its own."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from fettle.config import AutoscaleConfig, BatchConfig, FamilyConfig, ReplicaConfig, ServeConfig
from tests.fakes import FakeVariant, make_fake_family
from tests.integration.service import Service, service, wait_until

# About 100 ms a row of two words: a replica answers some ten rows a second, and sleeps meanwhile.
BUSY = FakeVariant("busy", ms_per_call=5, ms_per_token=25)
IDLE = FakeVariant("idle", ms_per_call=2, ms_per_token=0.02)
MOST = 3


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    where = tmp_path_factory.mktemp("scaled")
    for name, variant in {"work": BUSY, "rest": IDLE}.items():
        make_fake_family(where / name, name=name, variants=[variant])
    config = ServeConfig(
        families=[FamilyConfig(path=str(where / name)) for name in ("work", "rest")],
        replicas=ReplicaConfig(min_replicas=0, max_replicas=MOST),
        batch=BatchConfig(max_queue_s=30),
        autoscale=AutoscaleConfig(down_delay_s=2, zero_delay_s=4),
    )
    with service(config, where / "log") as running:
        yield running


class Clients:
    """Ask again and again from some threads; every reply's status is counted."""

    def __init__(self, url: str, threads: int) -> None:
        self.statuses: Counter[int] = Counter()
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=120) as client:
            while not self._over.is_set():
                reply = client.post(f"{self._url}/classify", json={"model": "work", "input": "quick fox"})
                self.statuses[reply.status_code] += 1


def replicas(running: Service, family: str, variant: str) -> int | None:
    """As the routers know it; None before they have said anything."""
    families = httpx.get(f"{running.url}/stats", timeout=60).json()["live"].get("families", [])
    found = [each for one in families if one["name"] == family for each in one["variants"] if each["id"] == variant]
    return found[0]["replicas"] if found else None


@pytest.mark.long
@pytest.mark.timeout(400)
def test_replicas_come_with_the_load_and_go_without_it(scaled):
    # Nobody has asked, so nothing runs; a request waits until something does.
    assert wait_until(lambda: replicas(scaled, "work", "busy") == 0, 60)
    first = httpx.post(f"{scaled.url}/classify", json={"model": "work", "input": "quick fox"}, timeout=120)
    assert first.status_code == 200, first.text
    assert replicas(scaled, "rest", "idle") == 0
    with Clients(scaled.url, 24) as clients:
        assert wait_until(lambda: replicas(scaled, "work", "busy") == MOST, 120), scaled.tail()
        time.sleep(2)
    assert set(clients.statuses) == {200}, clients.statuses
    # Down to nothing while others ask on, and back.
    with Clients(scaled.url, 1) as trickle:
        assert wait_until(lambda: replicas(scaled, "work", "busy") < MOST, 120), scaled.tail()
    assert set(trickle.statuses) == {200}, trickle.statuses
    assert wait_until(lambda: replicas(scaled, "work", "busy") == 0, 120), scaled.tail()
    again = httpx.post(f"{scaled.url}/classify", json={"model": "work", "input": "quick fox"}, timeout=120)
    assert again.status_code == 200, again.text
    # What cannot be there in time is said at once.
    late = httpx.post(
        f"{scaled.url}/classify",
        json={"model": "rest", "input": "fox"},
        headers={"x-request-timeout-seconds": "1"},
        timeout=120,
    )
    assert late.status_code == 504, late.text
