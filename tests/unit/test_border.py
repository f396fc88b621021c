"""Whatever a client sends, the reply has the documented error shape: never a 422, never a 500."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response

from deployments import border
from deployments.api import build_api
from deployments.haproxy import SECRET_HEADER
from deployments.router import Client, Router
from fettle.config import LimitConfig
from fettle.errors import FettleError
from fettle.family import Family
from fettle.manifest import TaskKind
from fettle.scheduling import Queue
from tests.fakes import FakeVariant, classify_task, embed_task, make_fake_family, token_id
from tests.inprocess import client_of, listening, make_app, make_router

pytestmark = pytest.mark.anyio

KEY = "a-key-of-some-length"
CLIENTS = {"another-key": Client("another"), KEY: Client("somebody")}
MANY = 10_000
# What each path takes, with one place for the inputs.
BODIES = {
    "/v1/embeddings": ("input", {"model": "emb"}),
    "/classify": ("input", {"model": "sections"}),
    "/embed": ("inputs", {"model": "emb"}),
    "/predict": ("inputs", {"model": "sections"}),
    "/tokenize": ("inputs", {"model": "emb"}),
}
PATHS = pytest.mark.parametrize("path", BODIES)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Family]:
    where = tmp_path_factory.mktemp("families")
    failing = [FakeVariant(fail_on_token=token_id("poison"))]
    return [
        make_fake_family(where / "s", name="sections", task=classify_task(), variants=failing),
        make_fake_family(where / "e", name="emb", task=embed_task(4), variants=failing),
    ]


@pytest.fixture(scope="module")
def app(families: list[Family]) -> FastAPI:
    return make_app(families)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


def assert_error(response: httpx.Response, *statuses: int) -> dict[str, str | None]:
    assert response.status_code in statuses, response.text[:300]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, str | None] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert len(error["message"]) < 1000
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    return error


async def post_inputs(client: httpx.AsyncClient, path: str, inputs: object, **more: object) -> httpx.Response:
    field, body = BODIES[path]
    return await client.post(path, json={**body, field: inputs, **more})


async def post_bytes(client: httpx.AsyncClient, path: str, content: bytes, **headers: str) -> httpx.Response:
    return await client.post(path, content=content, headers={"content-type": "application/json", **headers})


async def assert_well(client: httpx.AsyncClient) -> None:
    """The service still answers, and nothing is left in its queues."""
    for path in BODIES:
        assert (await post_inputs(client, path, "the fox")).status_code == 200
    for family in (await client.get("/info")).json()["families"]:
        assert [variant["queued"] for variant in family["variants"]] == [0]
        assert [variant["backlog_s"] for variant in family["variants"]] == [0]


@PATHS
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b"NaN",
        b"{'input': 'x'}",
        b'{"input": "fox",}',
        b'{"input": "fox"} trailing',
        b'{"input": \xff\xfe}',
        b'{"input": "\xff\xfe", "inputs": "\xc3\x28"}',
        b'{"input": "\xed\xa0\x80", "inputs": "\xed\xa0\x80"}',
        b'{"input": "\\ud800", "inputs": "\\ud800"}',
        b'{"input": "a\\udc00b", "inputs": "a\\udc00b"}',
        b'{"input": "\x00", "inputs": "\x00"}',
        b"[" * 100_000,
        b'{"input":' + b"[" * 100_000,
        b'{"inputs":' + b"[" * 50_000 + b'"x"' + b"]" * 50_000 + b"}",
        b'{"a":' * 50_000,
        b'{"input": NaN, "inputs": NaN}',
        b'{"input": [NaN], "inputs": [Infinity]}',
        b"\xef\xbb\xbf{}",
        b"\x00" * 1000,
        '{"input": "fox"}'.encode("utf-16"),
    ],
    ids=lambda content: repr(content[:24]),
)
async def test_a_body_that_is_no_json_object_of_the_right_kind(client, path, content):
    assert_error(await post_bytes(client, path, content), 400)


@PATHS
@pytest.mark.parametrize(
    "inputs",
    [
        "",
        [],
        [""],
        ["fox", ""],
        [[]],
        [["fox"], []],
        None,
        True,
        1.5,
        17,
        {},
        {"text": "fox"},
        [None],
        ["fox", 5],
        [5, "fox"],
        [["fox", "fox", "fox"]],
        [[["fox"]]],
        [True],
        [True, False],
        [1.0],
        [1.5],
        [[5], [True]],
        [[5], "fox"],
        [-1],
        [[5, -1]],
        [10**30],
        [2**31],
        [2**63],
        [-(2**63) - 1],
        [{}],
    ],
    ids=repr,
)
async def test_inputs_of_a_wrong_type_or_empty(client, path, inputs):
    field, _ = BODIES[path]
    error = assert_error(await post_inputs(client, path, inputs), 400)
    assert error["param"] == field


@pytest.mark.parametrize("path", ["/v1/embeddings", "/classify", "/embed"])
@pytest.mark.parametrize("ids", [[260 + 4, 0], [0, 100_000], [[5], [2**31 - 1]]], ids=repr)
async def test_token_ids_outside_the_vocabulary(client, path, ids):
    error = assert_error(await post_inputs(client, path, ids), 400)
    assert error["param"] == "input"
    assert "vocabulary" in str(error["message"])


async def test_the_last_token_id_is_inside_the_vocabulary(client, families):
    last = families[0].manifest.tokenizer.vocabulary - 1
    assert (await post_inputs(client, "/embed", [last])).status_code == 200
    assert_error(await post_inputs(client, "/embed", [last + 1]), 400)


@PATHS
@pytest.mark.parametrize(
    "fields",
    [{"unknown": 1}, {"temperature": 0.5}, {"model": 5}, {"model": ["emb"]}, {"truncat": True}, {"": ""}],
    ids=repr,
)
async def test_unknown_fields_and_fields_of_a_wrong_type(client, path, fields):
    error = assert_error(await post_inputs(client, path, "fox", **fields), 400)
    assert error["param"] in {*fields, "body"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"dimensions": 0}),
        ("/v1/embeddings", {"dimensions": -1}),
        ("/v1/embeddings", {"dimensions": 5}),
        ("/v1/embeddings", {"dimensions": "3"}),
        ("/v1/embeddings", {"dimensions": 2.0}),
        ("/v1/embeddings", {"dimensions": True}),
        ("/v1/embeddings", {"dimensions": 10**40}),
        ("/v1/embeddings", {"encoding_format": "int8"}),
        ("/v1/embeddings", {"encoding_format": None}),
        ("/v1/embeddings", {"truncate_prompt_tokens": -2}),
        ("/v1/embeddings", {"truncate_prompt_tokens": 0}),
        ("/v1/embeddings", {"truncate_prompt_tokens": 1}),
        ("/classify", {"truncate_prompt_tokens": 1.5}),
        ("/embed", {"truncate": "yes"}),
        ("/embed", {"truncation_direction": "left"}),
        ("/embed", {"dimensions": 5}),
        ("/predict", {"raw_scores": 1}),
    ],
    ids=repr,
)
async def test_options_out_of_range(client, path, fields):
    error = assert_error(await post_inputs(client, path, "fox", **fields), 400)
    assert error["param"] in fields


@PATHS
async def test_ten_thousand_inputs(client, path):
    inputs = [["fox"]] * MANY if path == "/predict" else ["fox"] * MANY
    assert_error(await post_inputs(client, path, inputs), 413)


async def test_ten_thousand_lists_of_token_ids(client):
    assert_error(await post_inputs(client, "/embed", [[5]] * MANY), 413)


@PATHS
async def test_a_text_of_five_megabytes(client, path):
    assert_error(await post_inputs(client, path, "fox " * 1_250_000), 413)


@PATHS
async def test_a_body_that_does_not_say_how_long_it_is(client, path):
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65_536

    response = await client.post(path, content=endless(), headers={"content-type": "application/json"})
    assert_error(response, 413)


@pytest.mark.parametrize("length", ["²", "-1", "1e9", "", "9" * 400], ids=repr)
async def test_a_body_that_lies_about_its_length(client, length):
    headers = {"content-type": "application/json", "content-length": length.encode("latin-1")}
    response = await client.post("/classify", content=b'{"input": "fox"}', headers=headers)
    assert response.status_code == 200 or assert_error(response, 400, 413)


async def test_a_very_long_text_within_the_limit_is_answered(client):
    response = await post_inputs(client, "/embed", "fox " * 100_000)
    assert response.status_code == 200
    assert response.headers["x-fettle-truncated"] == "1"


@PATHS
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json", "\xff"]
)
async def test_a_wrong_content_type(client, path, kind):
    field, body = BODIES[path]
    content = json.dumps({**body, field: "fox"}).encode()
    response = await client.post(path, content=content, headers={"content-type": kind.encode("latin-1")})
    assert_error(response, 400)


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_a_right_content_type(client, kind):
    response = await client.post("/embed", content=b'{"inputs": "fox"}', headers={"content-type": kind})
    assert response.status_code == 200


async def test_a_body_without_a_content_type_is_taken_as_json(client):
    assert (await client.post("/embed", content=b'{"inputs": "fox"}')).status_code == 200


@pytest.mark.parametrize("model", ["nobody", "", ":", ":fake", "emb:nothing", "emb:fake:x", "\x00", "é", "x" * 900])
async def test_a_model_that_is_not_there(client, model):
    response = await client.post("/v1/embeddings", json={"model": model, "input": "fox"})
    assert_error(response, 404)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"])
@PATHS
async def test_a_wrong_method(client, path, method):
    response = await client.request(method, path)
    assert_error(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/info", "/quality", "/stats", "/v1/models"])
async def test_posting_where_there_is_nothing_to_post(client, path):
    assert_error(await client.post(path, json={}), 405)


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/embeddings/", "/classify/x", "/%00", "/é", "/health/"])
async def test_an_unknown_path(client, path):
    assert_error(await client.get(path), 404, 405)
    assert_error(await client.post(path, json={"input": "fox"}), 404, 405)


async def test_a_row_that_the_engine_cannot_do(client):
    error = assert_error(await post_inputs(client, "/embed", ["fox", "poison"]), 500)
    assert error["code"] == "engine_failed"
    await assert_well(client)


async def test_a_bug_is_a_500_in_the_same_shape_and_tells_nothing(families, monkeypatch):
    async def bug(*args: object, **kwargs: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(Router, "infer", bug)
    async with client_of(make_app(families)) as client:
        response = await post_inputs(client, "/embed", "fox")
        assert_error(response, 500)
        assert "secret" not in response.text


async def test_an_overloaded_service_says_when_to_come_back(families, monkeypatch):
    monkeypatch.setattr(Queue, "has_room", lambda self, *asked: False)
    monkeypatch.setattr(Queue, "work_ms", lambda self, *asked: 3200.0)
    async with client_of(make_app(families)) as client:
        for path in ("/v1/embeddings", "/classify", "/embed", "/predict"):
            response = await post_inputs(client, path, "fox")
            error = assert_error(response, 429)
            assert error["type"] == "overloaded_error"
            assert response.headers["retry-after"] == "3"


async def test_what_was_refused_left_nothing_behind(client):
    for inputs in ("", [], [10**30], ["fox"] * 300, 5, ["fox", "poison"]):
        for path in BODIES:
            await post_inputs(client, path, inputs)
    await assert_well(client)


async def test_limits_are_configurable(families):
    limits = LimitConfig(max_body_bytes=100, max_inputs=2)
    async with client_of(make_app(families, limits=limits)) as client:
        assert (await post_inputs(client, "/embed", ["fox"] * 2)).status_code == 200
        assert_error(await post_inputs(client, "/embed", ["fox"] * 3), 413)
        assert_error(await post_inputs(client, "/embed", "fox " * 30), 413)


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_bug(families, caplog):
    """Seen from the server: some of the body, then a disconnect."""
    app = make_app(families)
    messages = [
        {"type": "http.request", "body": b'{"inputs": "f', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent = []

    async def receive() -> dict[str, object]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/embed", "raw_path": b"/embed", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    assert "unexpected error" not in caplog.text
    assert all(message.get("status") != 500 for message in sent)


# Keys.

PROTECTED = [
    "/docs", "/openapi.json", "/info", "/ready", "/v1/models", "/quality", "/stats", "/nowhere", "/page.html",
    "/health/", "/x/health", "/HEALTH",
]  # fmt: skip


@pytest.fixture
async def guarded(families: list[Family]) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(families, clients=CLIENTS)) as client:
        yield client


@pytest.mark.parametrize("path", PROTECTED)
async def test_without_a_key_nothing_but_health_and_the_page_is_open(guarded, path):
    response = await guarded.get(path)
    error = assert_error(response, 401)
    assert error["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"


@PATHS
async def test_without_a_key_no_path_answers_or_even_reads(guarded, path):
    assert_error(await post_inputs(guarded, path, "fox"), 401)
    assert_error(await post_bytes(guarded, path, b"{"), 401)
    assert_error(await guarded.delete(path), 401)


@pytest.mark.parametrize("path", ["/health", "/"])
async def test_health_and_the_page_need_no_key(guarded, path):
    assert (await guarded.get(path)).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        f"Bearer {KEY}x".encode(),
        f"Bearer {KEY[:-1]}".encode(),
        f"Bearer {KEY.upper()}".encode(),
        f"Basic {KEY}".encode(),
        KEY.encode(),
        "Bearer ключ".encode(),
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 50_000,
    ],
    ids=lambda header: repr(header[:30]),
)
async def test_every_wrong_key_gets_the_same_reply(guarded, header):
    response = await guarded.get("/info", headers={"authorization": header})
    assert_error(response, 401)
    missing = await guarded.get("/info")
    assert response.content == missing.content
    assert response.headers == missing.headers


@pytest.mark.parametrize("key", [KEY, "another-key"])
async def test_each_key_opens_every_path(guarded, key):
    headers = {"authorization": f"Bearer {key}"}
    for path in ("/docs", "/openapi.json", "/info", "/ready", "/v1/models", "/quality", "/stats"):
        assert (await guarded.get(path, headers=headers)).status_code == 200
    response = await guarded.post("/embed", json={"inputs": "fox"}, headers=headers)
    assert response.status_code == 200


async def test_the_scheme_of_the_key_may_be_written_in_any_case(guarded):
    assert (await guarded.get("/info", headers={"authorization": f"bearer {KEY}"})).status_code == 200


async def test_no_reply_shows_a_key(guarded):
    for path in ("/info", "/openapi.json", "/v1/models", "/quality", "/stats", "/"):
        response = await guarded.get(path, headers={"authorization": f"Bearer {KEY}"})
        assert KEY not in response.text


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "GZIP"])
@PATHS
async def test_a_compressed_body_is_not_unpacked(client, path, encoding):
    response = await post_bytes(client, path, gzip.compress(bytes(10_000_000)), **{"content-encoding": encoding})
    assert assert_error(response, 415)["param"] == "content-encoding"
    await assert_well(client)


async def refused(app: FastAPI, path: str, kind: str = "application/json", piece: bytes = b" ") -> tuple[int, bool]:
    """Post a body that never ends, as a server gives it to the application: the status, and whether it is the last."""
    started: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.append(message)

    headers = [(b"content-type", kind.encode()), (b"transfer-encoding", b"chunked")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    (start,) = started
    return start["status"], (b"connection", b"close") in start["headers"]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(border, "LINGER_S", 0.05)


@PATHS
async def test_a_body_that_does_not_end_in_time_is_given_up_and_so_is_its_connection(families, path):
    app = make_app(families, limits=LimitConfig(body_within_s=0.05))
    assert await refused(app, path) == (408, True)


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("/classify", "application/json", 413),
        ("/nowhere", "application/json", 404),
        ("/health", "application/json", 405),
        ("/classify", "text/plain", 400),
    ],
)
async def test_what_is_refused_before_its_body_ends_is_not_listened_to(families, path, kind, status):
    app = make_app(families, limits=LimitConfig(max_body_bytes=100_000))
    assert await refused(app, path, kind, b" " * 4096) == (status, True)


async def test_who_has_no_key_is_not_listened_to(families):
    assert await refused(make_app(families, clients=CLIENTS), "/classify") == (401, True)


async def test_what_is_too_large_is_read_to_its_end_if_that_is_near(families):
    """Many clients read no reply before they have sent everything."""
    app = make_app(families, limits=LimitConfig(max_body_bytes=1000))
    async for url in listening(app):
        async with httpx.AsyncClient(base_url=url) as client:
            for _ in range(2):
                response = await post_bytes(client, "/classify", b" " * 5_000_000)
                assert_error(response, 413)
                assert "connection" not in response.headers


async def test_a_connection_stays_when_the_body_was_read(client):
    for model, status in (("sections", 200), ("none", 404)):
        response = await client.post("/classify", json={"model": model, "input": "fox"})
        assert response.status_code == status
        assert "connection" not in response.headers


@pytest.mark.parametrize("name", ["m" * 100_000, "sections:" + "v" * 100_000])
async def test_an_error_does_not_repeat_what_is_long(client, name):
    response = await client.post("/classify", json={"model": name, "input": "fox"})
    assert_error(response, 404)
    assert len(response.content) < 1500


async def test_a_router_behind_a_proxy_answers_nobody_else(families):
    router = make_router(families)
    secret = "0123456789abcdef"
    async with client_of(build_api(router, proxy_secret=secret)) as client:
        for path in ("/", "/health", "/info", "/docs"):
            assert assert_error(await client.get(path), 403)["code"] == "not_through_the_proxy"
            for wrong in ("", secret[:-1], secret + "0"):
                assert_error(await client.get(path, headers={SECRET_HEADER: wrong}), 403)
            assert (await client.get(path, headers={SECRET_HEADER: secret})).status_code == 200
        assert_error(await post_inputs(client, "/embed", "fox"), 403)


def test_a_router_without_families_is_impossible_to_ask(tmp_path: Path):
    router = make_router([])
    with pytest.raises(FettleError):
        router.ask(None, TaskKind.CLASSIFY)


@pytest.mark.parametrize("headers", [None, {}, {"Retry-After": "3", "x-fettle-class": "0.01", "x-fettle-b": "caf\xe9"}])
def test_a_reply_has_the_headers_that_starlette_gives_one(headers):
    ours = border.reply({"a": [1, "é"]}, headers, 429)
    theirs = Response(ours.body, 429, headers, media_type="application/json")
    assert ours.raw_headers == theirs.raw_headers
    assert (ours.status_code, ours.body, dict(ours.headers)) == (theirs.status_code, theirs.body, dict(theirs.headers))
    assert ours.background is None


@pytest.mark.parametrize(
    "kind", ["Application/JSON", "application/json; charset=utf-8", " application/json", "a/b+json"]
)
async def test_a_content_type_may_be_written_in_several_ways(client, kind):
    response = await post_bytes(client, "/classify", b'{"model": "sections", "input": "fox"}', **{"content-type": kind})
    assert response.status_code == 200
