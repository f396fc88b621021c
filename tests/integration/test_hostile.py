"""The corpus of hostile requests against the service on Ray, through HAProxy: nothing breaks, grows, leaks or stays."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import islice

import psutil
import pytest

from benchmarks.hostile import Outcome, ask, attack, judge, mutations
from benchmarks.hostile_corpus import corpus
from benchmarks.hostile_requests import Attack, request
from benchmarks.slow_readers import SlowReaders, until_free
from tests.integration.service import Service, wait_until

pytestmark = pytest.mark.slow

# Everything at once is some 20 bodies of 2 MB, in pieces and whole.
GROWTH_MB = 150
AT_ONCE = 8
MUTATIONS = 300
SLOW_READERS = 40


@pytest.fixture(scope="module")
def outcomes(one_service: Service) -> dict[str, tuple[Attack, Outcome]]:
    """Every attack's outcome; the slow ones wait beside the others."""
    attacks = corpus()
    with ThreadPoolExecutor(AT_ONCE + sum(each.slow for each in attacks)) as pool:
        running = {pool.submit(attack, one_service.port, each.send, to_the_end=each.closes): each for each in attacks}
        return {running[done].name: (running[done], done.result()) for done in as_completed(running)}


@pytest.fixture(scope="module")
def before(one_service: Service) -> tuple[tuple[int, bytes], float]:
    """What an ordinary request gets, and the router's memory, before any attack."""
    return ask(one_service.port), memory_mb(one_service)


def memory_mb(service: Service) -> float:
    routers = service.replicas("RouterIngress")
    assert routers
    return sum(router.memory_info().rss for router in routers) / 1e6


@pytest.mark.parametrize("name", [each.name for each in corpus()])
def test_each_is_refused_or_answered(before, outcomes, name):
    assert judge(*outcomes[name]) == []


def test_afterwards_all_is_as_before(one_service, before, outcomes):
    routers = one_service.replicas("RouterIngress")
    answer, memory = before
    assert answer[0] == 200
    assert ask(one_service.port) == answer
    assert memory_mb(one_service) - memory < GROWTH_MB
    assert one_service.replicas("RouterIngress") == routers


def test_random_mutations_of_them(one_service, before):
    chance = random.Random(7)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tried = list(islice(mutations(corpus(), chance), MUTATIONS))
        found = pool.map(lambda each: judge(each, attack(one_service.port, each.send, within_s=1.0)), tried)
        assert [wrong for wrongs in found for wrong in wrongs] == []
    assert ask(one_service.port) == before[0]


def test_the_routers_own_port_answers_nobody_but_haproxy(one_service):
    for port in http_ports(one_service):
        for path in ("/health", "/info", "/"):
            head = f"GET {path} HTTP/1.1"
            for headers in ("", "x-fettle-proxy: \r\n", f"x-fettle-proxy: {'0' * 64}\r\n"):
                outcome = attack(port, lambda _, h=headers, head=head: iter([request(b"", line=head, headers=h)]))
                assert outcome.statuses == [403], outcome.reply


def http_ports(service: Service) -> Iterator[int]:
    """Of the routers, where HAProxy reaches them."""
    for router in service.replicas("RouterIngress"):
        for connection in router.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and 30_000 <= connection.laddr.port <= 31_000:
                yield connection.laddr.port


def test_what_one_needs_haproxy_for_listens_on_loopback_only(one_service):
    proxies = [process for process in one_service.descendants() if process.name() == "haproxy"]
    listening = [
        connection.laddr.ip
        for proxy in proxies
        for connection in proxy.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 3
    assert set(listening) == {"127.0.0.1"}


def test_readers_that_never_read_take_no_place_from_others(one_service, before):
    """More streams than all replicas together have places for, and nobody takes what they write."""
    body = json.dumps(
        {"model": "lm:int4", "prompt": "a", "max_tokens": 400, "temperature": 1.5, "stream": True}
    ).encode()
    with ExitStack() as open_sockets:
        for _ in range(SLOW_READERS):
            reader = open_sockets.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", one_service.port))
            reader.sendall(request(body, path="/v1/completions"))

        def answered() -> bool:
            short = json.dumps({"model": "lm:int4", "prompt": "a", "max_tokens": 2}).encode()
            outcome = attack(one_service.port, lambda _: iter([request(short, path="/v1/completions")]), within_s=30)
            assert set(outcome.statuses) <= {200, 429}, outcome.reply
            return 200 in outcome.statuses

        started = time.monotonic()
        assert wait_until(answered, 60), f"no text for {time.monotonic() - started:.0f} s"
    assert ask(one_service.port) == before[0]
    assert wait_until(lambda: one_service.info("lm", "int4")["running"] == 0, 60)


@pytest.mark.long
def test_a_byte_a_second_holds_no_slot_and_no_connection_for_ever(one_service, before):
    memory = memory_mb(one_service)
    with SlowReaders(one_service.port, SLOW_READERS, "lm:int4") as readers:
        assert wait_until(lambda: readers.most_slots > 0, 60)
        assert until_free(one_service.port, 120) is not None
        assert memory_mb(one_service) - memory < GROWTH_MB
        # The router gives up who takes nothing of its 64 kB for 30 s, HAProxy who takes nothing of its own for 60 s.
        assert wait_until(lambda: readers.held() == 0, 200), readers.held()
        # The first line, a byte a second.
        assert wait_until(lambda: sum(readers.statuses.values()) == SLOW_READERS, 60)
        assert set(readers.statuses) <= {"200", "429"}
        assert readers.statuses["200"] >= 1
        assert readers.wrong == []
    assert ask(one_service.port) == before[0]
