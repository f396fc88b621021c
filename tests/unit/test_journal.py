"""What is said of requests that went wrong: with their ids, one line each, never their texts or keys, never a flood."""

from __future__ import annotations

import json
import logging

import pytest
from ray._common.formatters import JSONFormatter

from deployments import notes
from deployments.journal import LONGEST_ID, MOST_LINES, Journal, request_id
from deployments.router import Client
from fettle.config import GearConfig
from fettle.errors import EngineError, OverloadedError, RequestError
from tests.fakes import FakeVariant, make_fake_family, token_id
from tests.inprocess import client_of, make_app

pytestmark = pytest.mark.anyio
KEY = "a-very-secret-key"


@pytest.fixture
def app(tmp_path):
    family = make_fake_family(tmp_path / "f", variants=[FakeVariant("ref", fail_on_token=token_id("poison"))])
    return make_app([family], clients={KEY: Client("search")})


def lines(caplog) -> list[dict]:
    """As Serve writes them where `logging_config` says JSON."""
    formatter = JSONFormatter()
    return [json.loads(formatter.format(record)) for record in caplog.records if record.name == "ray.serve.fettle"]


async def ask(app, input: str = "fox", **headers: str):
    sent = {"authorization": f"Bearer {KEY}", **headers}
    async with client_of(app) as client:
        return await client.post("/classify", json={"input": input, "max_disagreement": "exact"}, headers=sent)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123", "abc-123"),
        ("00-4bf92f3577b34da6a3ce-00f067aa0ba902b7-01", "00-4bf92f3577b34da6a3ce-00f067aa0ba902b7-01"),
        ("two\nlines", "two_lines"),
        ('"quoted" {id}', "_quoted___id_"),
        ("x" * 1000, "x" * LONGEST_ID),
    ],
)  # fmt: skip
def test_a_clients_own_id_is_kept_as_far_as_it_is_one(given, kept):
    assert request_id(given) == kept


@pytest.mark.parametrize("given", [None, ""])
def test_a_request_without_an_id_gets_one(given):
    assert len(request_id(given)) == 32
    assert request_id(given) != request_id(given)


async def test_nothing_is_written_while_all_is_well(app, caplog):
    caplog.set_level(logging.DEBUG, "ray.serve.fettle")
    assert (await ask(app)).status_code == 200
    assert not lines(caplog)


async def test_an_error_is_one_line_with_all_that_is_known(app, caplog):
    response = await ask(app, "the poison", **{"x-request-id": "mine-7"})
    assert response.status_code == 500
    [line] = [line for line in lines(caplog) if line.get("code") == "engine_failed"]
    told = {name: line[name] for name in ("levelname", "request_id", "status", "path", "family", "class", "client")}
    assert told == {
        "levelname": "ERROR",
        "request_id": "mine-7",
        "status": 500,
        "path": "/classify",
        "family": "fake",
        "class": "exact",
        "client": "search",
    }
    assert line["message"] == response.json()["error"]["message"]
    assert {"asctime", "timestamp_ns"} & line.keys()


async def test_neither_keys_nor_texts_are_written(app, caplog):
    caplog.set_level(logging.DEBUG, "ray.serve.fettle")
    await ask(app, "the poison quick")
    await ask(app, authorization="Bearer another-secret")
    await ask(app, authorization=f"Basic {KEY}")
    await ask(app, **{"x-max-disagreement": "nine", "x-request-timeout-seconds": "0"})
    said = json.dumps(lines(caplog))
    assert len(lines(caplog)) >= 4
    for secret in (KEY, "another-secret", "poison", "quick"):
        assert secret not in said


async def test_a_slow_request_says_who_answered_and_where_the_time_went(tmp_path, caplog, monkeypatch):
    family = make_fake_family(tmp_path / "f")
    app = make_app([family])
    assert (await ask(app)).status_code == 200
    assert not lines(caplog)
    monkeypatch.setattr(notes, "SLOW", 1e-9)
    await ask(app, **{"x-request-id": "slow-1"})
    [line] = lines(caplog)
    assert (line["kind"], line["request_id"], line["family"], line["variant"]) == ("slow", "slow-1", "fake", "fake")
    assert line["took_ms"] > 0
    assert {"queue_ms", "infer_ms", "tokenize_ms", "class"} <= line.keys()
    assert GearConfig().objective_ms == 100


def test_a_flood_is_not_a_flood_of_lines(caplog):
    now = [100.0]
    journal = Journal(clock=lambda: now[0])
    for _ in range(1000):
        journal.failed(OverloadedError("full", retry_after_s=1), "id")
    journal.failed(RequestError("another kind"), "id")
    assert len(lines(caplog)) == MOST_LINES + 1
    assert journal.errors == {(429, "overloaded"): 1000, (400, "invalid_request"): 1}
    now[0] += 1
    journal.failed(OverloadedError("full", retry_after_s=1), "id")
    assert lines(caplog)[-2]["message"] == f"{1000 - MOST_LINES} more lines like the last were not written"


@pytest.mark.parametrize(
    ("error", "level"),
    [(EngineError("x"), "ERROR"), (RequestError("x"), "WARNING"), (OverloadedError("x", retry_after_s=1), "WARNING")],
)
def test_only_what_is_the_services_own_is_an_error(caplog, error, level):
    Journal().failed(error, "id")
    assert [line["levelname"] for line in lines(caplog)] == [level]
