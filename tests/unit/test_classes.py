"""Quality classes, deadlines, priorities and keys over HTTP: what a request may say, and what its reply says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import fettle
from deployments import schemas
from deployments.api import build_api
from deployments.keyring import Keyring
from deployments.router import Client, Router
from fettle.config import FamilyConfig, LimitConfig
from fettle.family import Family
from fettle.gears import Gear
from fettle.limits import KeyLimits
from fettle.points import NEVER
from tests.fakes import FakeVariant, embed_task, make_fake_family, make_point, make_step
from tests.inprocess import client_of, make_app, make_router, slots_of

pytestmark = pytest.mark.anyio

VARIANTS = [FakeVariant("fp32"), FakeVariant("exits", stages=3), FakeVariant("int8", tokens_read=3)]
ONE = make_point("one", 0.01, make_step("exits", 0.1, 0.1, 0.05), make_step("fp32"), cost=5.0)
FIVE = make_point("five", 0.05, make_step("int8"), cost=1.0)
CLASSES = {"gold": 0.005, "bulk": 0.05}
TEXTS = ["the quick brown fox", "word7 word3", "word200 the the the", "fox fox fox"]


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp("families") / "sections"
    return make_fake_family(directory, name="sections", variants=VARIANTS, points=[ONE, FIVE])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Embeddings, without certificates."""
    directory = tmp_path_factory.mktemp("families") / "emb"
    variants = [FakeVariant("fp32"), FakeVariant("int8")]
    return make_fake_family(directory, name="emb", task=embed_task(4), variants=variants, default="int8")


@pytest.fixture
def router(sections: Family, plain: Family) -> Router:
    return make_router([sections, plain], classes=CLASSES)


@pytest.fixture
async def client(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(build_api(router)) as client:
        yield client


async def classify(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await client.post("/classify", json={"model": "sections", "input": TEXTS, **body}, headers=headers)


async def served(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    response = await classify(client, headers, **body)
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()["fettle"]
    return shown


def assert_refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


# Classes.


@pytest.mark.parametrize(
    ("asked", "shown", "point", "bound"),
    [
        (None, "0.01", "one", ONE.certificate.upper_bound),
        (0.01, "0.01", "one", ONE.certificate.upper_bound),
        (0.02, "0.02", "one", ONE.certificate.upper_bound),
        (1, "1", "one", ONE.certificate.upper_bound),
        ("exact", "exact", None, "exact"),
        (0, "exact", None, "exact"),
        (0.0, "exact", None, "exact"),
        (0.009, "0.009", None, "exact"),
        ("gold", "gold", None, "exact"),
        ("bulk", "bulk", "one", ONE.certificate.upper_bound),
    ],
)
async def test_a_request_names_its_class_and_the_reply_who_answered_with_what_bound(client, asked, shown, point, bound):
    body = {} if asked is None else {"max_disagreement": asked}
    found = await served(client, **body)
    assert (found["class"], found["point"], found["bound"]) == (shown, point, bound)
    if point is None:
        assert (found["variant"], found["stage"]) == ("fp32", "0")


@pytest.mark.parametrize(
    ("asked", "shown"), [("0.05", "0.05"), ("exact", "exact"), (" gold ", "gold"), ("1e-3", "0.001")]
)
async def test_the_class_may_come_in_a_header(client, asked, shown):
    assert (await served(client, {"x-max-disagreement": asked}))["class"] == shown


async def test_the_body_goes_before_the_header(client):
    assert (await served(client, {"x-max-disagreement": "0.05"}, max_disagreement="exact"))["class"] == "exact"


@pytest.mark.parametrize("wrong", ["platinum", "", -0.1, 1.1, True, [0.1], {"alpha": 0.1}], ids=repr)
async def test_a_class_that_is_none(client, wrong):
    assert_refused(await classify(client, max_disagreement=wrong), 400, "invalid_request", "max_disagreement")


@pytest.mark.parametrize("wrong", ["-0.1", "1.5", "nan", "inf"])
async def test_a_share_in_the_header_that_is_none(client, wrong):
    assert_refused(await classify(client, {"x-max-disagreement": wrong}), 400, "invalid_request", "x-max-disagreement")


@pytest.mark.parametrize("wrong", ["platinum", "", "0,01", "1%"])
async def test_a_name_in_the_header_that_is_none(client, wrong):
    response = await classify(client, {"x-max-disagreement": wrong})
    assert_refused(response, 400, "invalid_request", "max_disagreement")
    assert "exact, gold, bulk" in response.json()["error"]["message"]


async def test_answers_are_those_of_predict_in_the_same_class(client, sections):
    with fettle.load(sections.directory) as local:
        for tolerance in (0.01, "exact"):
            response = await classify(client, max_disagreement=tolerance)
            wanted = local.predict(TEXTS, tolerance)
            assert [item["label"] for item in response.json()["data"]] == [each.answer for each in wanted]


async def test_every_endpoint_takes_a_class(client):
    for path, body in (
        ("/classify", {"model": "sections", "input": "fox"}),
        ("/predict", {"model": "sections", "inputs": "fox"}),
        ("/v1/embeddings", {"model": "emb", "input": "fox"}),
        ("/embed", {"model": "emb", "inputs": "fox"}),
    ):
        response = await client.post(path, json={**body, "max_disagreement": "exact"})
        assert response.status_code == 200
        assert (response.headers["x-fettle-class"], response.headers["x-fettle-bound"]) == ("exact", "exact")
        assert response.headers["x-fettle-variant"] == "fp32"
    response = await client.post("/tokenize", json={"model": "emb", "inputs": "fox", "max_disagreement": 0.1})
    assert response.status_code == 400


async def test_headers_say_what_the_body_says(client):
    response = await classify(client, max_disagreement=0.05)
    shown = response.json()["fettle"]
    given = {name.removeprefix("x-fettle-"): value for name, value in response.headers.items() if "x-fettle-" in name}
    assert given == {
        name.replace("_", "-"): str(value) for name, value in shown.items() if value is not None and value is not False
    }
    assert set(given) == {
        "router", "family", "class", "point", "bound", "variant", "stage", "gear", "truncated",
        "tokenize-ms", "queue-ms", "infer-ms",
    }  # fmt: skip
    assert (given["router"], given["family"], given["gear"]) == ("router-1", "sections", "0")


async def test_several_variants_and_stages_are_named_once_each(client):
    found = await served(client, explain=True)
    places = [(steps[-1]["variant"], str(steps[-1]["stage"])) for steps in found["explain"]]
    assert found["variant"].split(",") == list(dict.fromkeys(variant for variant, _ in places))
    assert found["stage"].split(",") == list(dict.fromkeys(stage for _, stage in places))


async def test_a_family_without_certificates_answers_with_its_default_variant(client):
    async def embed(**body: Any) -> dict[str, Any]:
        response = await client.post("/v1/embeddings", json={"model": "emb", "input": "fox", **body})
        shown: dict[str, Any] = response.json()["fettle"]
        return shown

    found = await embed()
    assert (found["class"], found["variant"], found["point"], found["bound"]) == ("pinned", "int8", None, "none")
    # Who asks for a class gets it, from the reference.
    found = await embed(max_disagreement=0.05)
    assert (found["class"], found["variant"], found["point"], found["bound"]) == ("0.05", "fp32", None, "exact")


# Pinned variants.


@pytest.mark.parametrize(
    ("variant", "bound", "stage"), [("fp32", "exact", "0"), ("int8", "none", "0"), ("exits", "none", "2")]
)
async def test_a_pinned_variant_is_never_replaced_and_goes_all_the_way(client, router, variant, bound, stage):
    router.families["sections"].gearbox._gears[0.05, False] = Gear(number=1)
    response = await classify(client, model=f"sections:{variant}")
    shown = response.json()["fettle"]
    assert (shown["class"], shown["point"], shown["bound"]) == ("pinned", None, bound)
    assert (shown["variant"], shown["stage"], shown["gear"]) == (variant, stage, 0)
    assert "x-fettle-point" not in response.headers
    assert response.json()["model"] == f"sections:{variant}"


async def test_a_pinned_variant_has_no_class(client):
    for headers, body in (({}, {"max_disagreement": 0.05}), ({"x-max-disagreement": "exact"}, {})):
        response = await classify(client, headers, model="sections:int8", **body)
        assert_refused(response, 400, "invalid_request", "max_disagreement")
        assert "never replaced" in response.json()["error"]["message"]


async def test_a_pinned_variant_that_is_full_is_refused_whatever_else_is_idle(client, router):
    async with flooded(router, client, "int8"):
        response = await classify(client, model="sections:int8", allow_degraded=True)
        assert_refused(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert (await classify(client, model="sections:exits")).status_code == 200


async def test_without_the_reference_what_is_not_certified_is_refused(sections):
    settings = {"sections": FamilyConfig(path=str(sections.directory), variants=["int8"], max_disagreement=0.05)}
    async with client_of(build_api(make_router([sections], settings=settings))) as client:
        assert (await served(client))["point"] == "five"
        for tolerance in (0.01, "exact"):
            response = await classify(client, max_disagreement=tolerance)
            assert_refused(response, 400, "invalid_request", "max_disagreement")
            assert "allow more disagreement" in response.json()["error"]["message"]


# Load.


def flooded(router: Router, client: httpx.AsyncClient, variant: str) -> Any:
    """While it lasts, the variant has a second of work to do, and does none of it."""
    return _Flood(router, client, variant)


class _Flood:
    def __init__(self, router: Router, client: httpx.AsyncClient, variant: str) -> None:
        self.gate = slots_of(router, "sections", variant).gate
        self.batcher = router.families["sections"].batchers[variant]
        self.client, self.variant = client, variant
        self.flood: list[asyncio.Task[httpx.Response]] = []

    async def __aenter__(self) -> None:
        self.gate.clear()
        # Each row counts for a millisecond.
        body = {"model": f"sections:{self.variant}", "input": ["fox"] * 250}
        self.flood = [asyncio.ensure_future(self.client.post("/classify", json=body)) for _ in range(5)]
        async with asyncio.timeout(10):
            while self.batcher.backlog_s < 1:
                await asyncio.sleep(0)

    async def __aexit__(self, *_: object) -> None:
        for task in self.flood:
            task.cancel()
        await asyncio.gather(*self.flood, return_exceptions=True)
        self.gate.set()


async def test_a_gear_is_a_point_of_the_class(client, router):
    gears = router.families["sections"].gearbox._gears
    gears[0.05, False] = Gear(number=1)
    found = await served(client, max_disagreement=0.05)
    assert (found["point"], found["gear"], found["degraded"]) == ("five", 1, False)
    assert (await served(client, max_disagreement=0.01))["point"] == "one"


async def test_no_request_leaves_its_class_unless_it_said_so_and_then_the_reply_says_so(client, router):
    async with flooded(router, client, "exits"):
        refused = await classify(client)
        assert_refused(refused, 429, "overloaded")
        response = await classify(client, allow_degraded=True)
        shown = response.json()["fettle"]
        assert (shown["class"], shown["point"], shown["degraded"]) == ("0.01", "five", True)
        assert shown["bound"] == FIVE.certificate.upper_bound
        assert response.headers["x-fettle-degraded"] == "true"
        # Within the class it is no degradation.
        response = await classify(client, allow_degraded=True, max_disagreement=0.05)
        assert (response.json()["fettle"]["point"], response.json()["fettle"]["degraded"]) == ("five", False)
        assert "x-fettle-degraded" not in response.headers
        assert (await served(client, max_disagreement="exact"))["variant"] == "fp32"


async def test_exact_is_answered_by_nothing_else_however_full_the_reference_is(client, router):
    async with flooded(router, client, "fp32"):
        assert_refused(await classify(client, max_disagreement="exact"), 429, "overloaded")
        found = await served(client, max_disagreement="exact", allow_degraded=True)
        assert (found["point"], found["degraded"]) == ("five", True)


async def test_allowed_and_not_needed_is_not_degraded(client):
    response = await classify(client, allow_degraded=True)
    assert response.json()["fettle"]["degraded"] is False
    assert "x-fettle-degraded" not in response.headers


# Explain.


async def test_explain_shows_the_way_of_each_row(client, sections):
    response = await classify(client, explain=True)
    reply = schemas.ClassifyReply.model_validate(response.json())
    assert reply.fettle.explain is not None
    with fettle.load(sections.directory) as local:
        wanted = local.predict(TEXTS, 0.01)
    for steps, prediction in zip(reply.fettle.explain, wanted, strict=True):
        last = steps[-1]
        assert (last.variant, last.stage, last.score) == (prediction.variant, prediction.stage, prediction.score)
        assert last.taken
        assert not any(step.taken for step in steps[:-1])
        first = steps[0]
        assert (first.variant, first.thresholds) == ("exits", [0.1, 0.1, 0.05])
        # An early stage that did not take the row saw a score below its threshold.
        assert len(first.scores) == 2
        for stage in range(min(first.stage, 2)):
            score = first.scores[stage]
            assert score is not None
            assert score < first.thresholds[stage]
        assert first.threshold == first.thresholds[first.stage]
        for step in steps:
            assert step.batch_rows >= 1
            assert step.queue_ms >= 0
            assert step.infer_ms >= 0


async def test_without_explain_nothing_is_explained(client):
    assert "explain" not in await served(client)
    for path, body in (("/predict", {"inputs": "fox", "model": "sections"}), ("/embed", {"inputs": "fox"})):
        response = await client.post(path, json={**body, "explain": True})
        assert_refused(response, 400, "invalid_request", "explain")


async def test_explain_of_vectors_has_no_scores(client):
    response = await client.post("/v1/embeddings", json={"model": "emb", "input": ["fox", "the"], "explain": True})
    [[step], [_]] = response.json()["fettle"]["explain"]
    assert (step["variant"], step["score"], step["scores"], step["taken"]) == ("int8", None, [], True)


async def test_explain_of_a_variant_alone_shows_gates_that_take_nothing_early(client):
    found = await served(client, model="sections:exits", explain=True)
    [step] = found["explain"][0]
    assert (step["stage"], step["thresholds"], step["scores"]) == (2, [NEVER, NEVER, 0.0], [])


# Deadlines and priorities.


@pytest.mark.parametrize("wrong", ["", "soon", "0", "-1", "nan", "inf", "3601", "1s", "1e400"])
async def test_a_timeout_that_is_none(client, wrong):
    response = await classify(client, {"x-request-timeout-seconds": wrong})
    assert_refused(response, 400, "invalid_request", "x-request-timeout-seconds")


@pytest.mark.parametrize("seconds", ["60", "0.5e2", "3600"])
async def test_what_can_be_in_time_is_answered(client, seconds):
    assert (await classify(client, {"x-request-timeout-seconds": seconds})).status_code == 200


async def test_a_deadline_that_cannot_be_met_is_refused_and_costs_nothing(client, router):
    # One row counts for a millisecond.
    response = await classify(client, {"x-request-timeout-seconds": "0.00001"})
    assert_refused(response, 504, "deadline")
    assert response.json()["error"]["type"] == "deadline_error"
    assert [slots_of(router, "sections", name).batches for name in ("fp32", "exits", "int8")] == [[], [], []]


async def test_a_reply_that_does_not_come_in_time_is_a_504(client, router):
    slots = slots_of(router, "sections", "exits")
    slots.gate.clear()
    assert_refused(await classify(client, {"x-request-timeout-seconds": "0.04"}), 504, "deadline")
    slots.gate.set()
    assert (await classify(client)).status_code == 200


async def test_batch_traffic_waits_until_nobody_else_does(client, router):
    slots = slots_of(router, "sections", "exits")
    slots.gate.clear()
    order: list[str] = []

    async def ask(name: str, **body: Any) -> None:
        response = await classify(client, input="word1 word2 word3", model="sections:exits", **body)
        assert response.status_code == 200
        order.append(name)

    tasks = [asyncio.ensure_future(ask("first"))]
    async with asyncio.timeout(10):
        while not slots.batches:
            await asyncio.sleep(0)
    tasks.append(asyncio.ensure_future(ask("batch", priority="batch")))
    batcher = router.families["sections"].batchers["exits"]
    async with asyncio.timeout(10):
        while batcher.depth < 1:
            await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(ask("later")))
        while batcher.depth < 2:
            await asyncio.sleep(0)
    slots.gate.set()
    await asyncio.gather(*tasks)
    assert order == ["first", "later", "batch"]


@pytest.mark.parametrize("wrong", ["high", "", 1, None, True])
async def test_a_priority_that_is_none(client, wrong):
    assert_refused(await classify(client, priority=wrong), 400, "invalid_request", "priority")


# Keys.

ANN, BEN = "key-of-ann", "key-of-ben"


def keyed(sections: Family, **limits: Any) -> httpx.AsyncClient:
    clients = {ANN: Client("ann", 1.0, KeyLimits(**limits)), BEN: Client("ben")}
    return client_of(build_api(make_router([sections]), Keyring(clients)))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def assert_limited(response: httpx.Response) -> None:
    assert_refused(response, 429, "rate_limited")
    assert int(response.headers["retry-after"]) >= 1
    assert "'ann'" in response.json()["error"]["message"]
    assert ANN not in response.text


async def test_a_key_may_have_so_many_requests_at_a_time(sections):
    router = make_router([sections])
    clients = {ANN: Client("ann", 1.0, KeyLimits(max_concurrent=2)), BEN: Client("ben")}
    slots = slots_of(router, "sections", "exits")
    slots.gate.clear()
    async with client_of(build_api(router, Keyring(clients))) as client:
        running = [asyncio.ensure_future(classify(client, bearer(ANN))) for _ in range(2)]
        async with asyncio.timeout(10):
            while router.families["sections"].batchers["exits"].queue.work_ms() < 2 * len(TEXTS) * 0.5:
                await asyncio.sleep(0)
        assert_limited(await classify(client, bearer(ANN)))
        others = asyncio.ensure_future(classify(client, bearer(BEN)))
        slots.gate.set()
        assert [(await each).status_code for each in [*running, others]] == [200] * 3
        assert (await classify(client, bearer(ANN))).status_code == 200
        # A request that fails gives its place back too.
        for _ in range(3):
            assert (await classify(client, bearer(ANN), input=[10**6])).status_code == 400
            response = await classify(client, bearer(ANN) | {"x-request-timeout-seconds": "0.00001"})
            assert response.status_code == 504
        assert (await classify(client, bearer(ANN))).status_code == 200


async def test_a_key_may_send_so_many_tokens_a_second(sections):
    async with keyed(sections, tokens_per_second=4.0) as client:
        # 20 tokens fit into a burst of five seconds; 24 are sent.
        assert (await classify(client, bearer(ANN))).status_code == 200
        assert_limited(await classify(client, bearer(ANN)))
        assert (await classify(client, bearer(BEN))).status_code == 200
        # Reading is not limited.
        assert (await client.get("/info", headers=bearer(ANN))).status_code == 200


async def test_what_was_refused_is_not_charged(sections):
    async with keyed(sections, tokens_per_second=1000.0) as client:
        for _ in range(50):
            response = await classify(client, bearer(ANN), input=["fox"] * 200, max_disagreement="platinum")
            assert response.status_code == 400
        assert (await classify(client, bearer(ANN))).status_code == 200


# What is only read.


async def test_quality_lists_the_families_even_without_a_monitor(client):
    reply = schemas.QualityReply.model_validate((await client.get("/quality")).json())
    assert [(family.name, family.points) for family in reply.families] == [("sections", []), ("emb", [])]


async def test_stats_has_its_shape(client):
    reply = schemas.Live.model_validate((await client.get("/stats")).json())
    assert reply.version == fettle.__version__


async def test_the_page_needs_no_key_while_the_rest_does(sections):
    async with keyed(sections) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "<title>" in page.text
        for path in ("/quality", "/stats", "/info", "/v1/models"):
            assert_refused(await client.get(path), 401, "invalid_api_key")
            assert (await client.get(path, headers=bearer(BEN))).status_code == 200
        assert_refused(await classify(client), 401, "invalid_api_key")


async def test_the_document_describes_what_a_request_may_say(sections):
    async with client_of(make_app([sections])) as client:
        bodies = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for name in ("ClassifyRequest", "EmbeddingsRequest", "PredictRequest", "EmbedRequest"):
        assert {"max_disagreement", "allow_degraded", "priority"} <= set(bodies[name]["properties"])
    assert "explain" in bodies["ClassifyRequest"]["properties"]
    assert "explain" not in bodies["PredictRequest"]["properties"]
    assert set(bodies["Served"]["properties"]) >= {"class", "point", "bound", "gear", "degraded", "explain"}


async def test_too_many_inputs_are_refused_before_anything_else(sections):
    async with client_of(make_app([sections], limits=LimitConfig(max_inputs=2))) as client:
        response = await classify(client, {"x-request-timeout-seconds": "0.00001"})
        assert_refused(response, 413, "too_large", "input")


def test_the_points_of_these_tests_are_what_they_seem(sections: Family, tmp_path: Path):
    """`one` sends some rows on and keeps some, so that the replies above have both."""
    with fettle.load(sections.directory) as local:
        assert {prediction.variant for prediction in local.predict(TEXTS, 0.01)} == {"exits", "fp32"}
