"""Every endpoint's shape and values, over the real router with fake engines in this process."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import pytest

from fettle.answers import Floats, normalized, probabilities
from fettle.family import Family
from fettle.manifest import Head, Task, TaskKind
from fettle.tokenizer import Text, Tokenizer
from tests.fakes import FakeVariant, classify_task, embed_task, make_fake_family, token_id
from tests.inprocess import client_of, make_app
from workers.fake import expected

pytestmark = pytest.mark.anyio

WIDTH = 8
TEXTS = ["the quick brown fox", "word7 word3", "the", "fox fox fox unknown"]
LONG = " ".join(["fox"] * 100)
CUT_TO = 64


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    where = tmp_path_factory.mktemp("families")
    heads = {
        "topics": Task(kind=TaskKind.CLASSIFY, head=Head.MULTI_LABEL, labels=["a", "b"], width=2),
        "stars": Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, width=1),
    }
    variants = [FakeVariant("fp32"), FakeVariant("int8", disagreement=0.02)]
    return {
        "sections": make_fake_family(where / "s", name="sections", task=classify_task(), variants=variants),
        "emb": make_fake_family(where / "e", name="emb", task=embed_task(WIDTH)),
        **{name: make_fake_family(where / name, name=name, task=task) for name, task in heads.items()},
    }


@pytest.fixture
async def client(families: dict[str, Family]):
    async with client_of(make_app(list(families.values()))) as client:
        yield client


@pytest.fixture
async def small(families: dict[str, Family]):
    """One classifier and one embedding model, so that a request need not name its model."""
    async with client_of(make_app([families["sections"], families["emb"]])) as client:
        yield client


def logits(family: Family, texts: list[Text], max_length: int | None = None) -> Floats:
    """What the fake engine answers, before any head: float32 [texts, width]."""
    rows = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode(texts, max_length=max_length)
    return np.stack([expected(row.ids, family.manifest.task.width) for row in rows])


def vectors(family: Family, texts: list[Text], max_length: int | None = None) -> Floats:
    return normalized(logits(family, texts, max_length))


async def post(client: httpx.AsyncClient, path: str, **body: object) -> httpx.Response:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response


def floats(rows: list[list[float]]) -> Floats:
    return np.array(rows, np.float32)


# OpenAI's embeddings.


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=["many", "one"])
async def test_openai_embeddings_of_texts(client, families, texts):
    reply = (await post(client, "/v1/embeddings", model="emb", input=texts)).json()
    assert reply["object"] == "list"
    assert reply["model"] == "emb:fake"
    assert [item["index"] for item in reply["data"]] == list(range(len(texts)))
    assert {item["object"] for item in reply["data"]} == {"embedding"}
    # Exactly: float32 survives JSON.
    assert np.array_equal(floats([item["embedding"] for item in reply["data"]]), vectors(families["emb"], texts))
    tokens = sum(len(text.split()) + 2 for text in texts)
    assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


async def test_openai_embeddings_of_a_bare_string(client, families):
    reply = (await post(client, "/v1/embeddings", model="emb", input=TEXTS[0])).json()
    assert np.array_equal(floats([reply["data"][0]["embedding"]]), vectors(families["emb"], TEXTS[:1]))
    assert len(reply["data"]) == 1


async def test_openai_embeddings_in_base64_are_the_same_bytes(client, families):
    reply = (await post(client, "/v1/embeddings", model="emb", input=TEXTS, encoding_format="base64")).json()
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in reply["data"]]
    assert np.array_equal(np.stack(decoded), vectors(families["emb"], TEXTS))


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_fewer_dimensions_are_the_first_ones_of_length_one(client, families, encoding):
    body = {"model": "emb", "input": TEXTS, "dimensions": 3, "encoding_format": encoding}
    reply = (await post(client, "/v1/embeddings", **body)).json()
    got = [item["embedding"] for item in reply["data"]]
    if encoding == "base64":
        got = [np.frombuffer(base64.b64decode(text), "<f4").tolist() for text in got]
    wanted = normalized(vectors(families["emb"], TEXTS)[:, :3])
    assert np.array_equal(floats(got), wanted)
    assert np.linalg.norm(floats(got), axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)


async def test_all_dimensions_change_nothing(client, families):
    reply = (await post(client, "/v1/embeddings", model="emb", input=TEXTS, dimensions=WIDTH)).json()
    assert np.array_equal(floats([item["embedding"] for item in reply["data"]]), vectors(families["emb"], TEXTS))


@pytest.mark.parametrize("batch", [False, True], ids=["one list", "lists"])
async def test_openai_embeddings_of_token_ids(client, batch):
    lists = [[2, token_id("the"), 3], [5, 6, 7, 8, 9]] if batch else [[2, token_id("the"), 3]]
    reply = (await post(client, "/v1/embeddings", model="emb", input=lists if batch else lists[0])).json()
    wanted = normalized(np.stack([expected(np.array(ids, np.int32), WIDTH) for ids in lists]))
    assert np.array_equal(floats([item["embedding"] for item in reply["data"]]), wanted)
    assert reply["usage"]["prompt_tokens"] == sum(map(len, lists))


@pytest.mark.parametrize("ids", [False, True], ids=["text", "token ids"])
async def test_a_request_may_cut_its_inputs_shorter(client, families, ids):
    words = " ".join(["fox"] * 20)
    given = [token_id("fox")] * 20 if ids else words
    reply = (await post(client, "/v1/embeddings", model="emb", input=given, truncate_prompt_tokens=6)).json()
    assert reply["usage"]["prompt_tokens"] == 6
    assert reply["fettle"]["truncated"] == 1
    if not ids:
        assert np.array_equal(floats([reply["data"][0]["embedding"]]), vectors(families["emb"], [words], 6))


async def test_minus_one_means_the_models_own_limit(client):
    reply = (await post(client, "/v1/embeddings", model="emb", input=LONG, truncate_prompt_tokens=-1)).json()
    assert reply["usage"]["prompt_tokens"] == CUT_TO


# vLLM's classification.


async def test_vllm_classify(client, families):
    reply = (await post(client, "/classify", model="sections", input=TEXTS)).json()
    task = families["sections"].manifest.task
    scores = probabilities(logits(families["sections"], TEXTS), task)
    assert reply["object"] == "list"
    assert reply["id"].startswith("classify-")
    assert isinstance(reply["created"], int)
    assert reply["model"] == "sections:fp32"
    assert [item["index"] for item in reply["data"]] == [0, 1, 2, 3]
    assert [item["label"] for item in reply["data"]] == [task.labels[i] for i in scores.argmax(axis=1)]
    assert {item["num_classes"] for item in reply["data"]} == {3}
    assert np.array_equal(floats([item["probs"] for item in reply["data"]]), scores)
    assert sum(reply["data"][0]["probs"]) == pytest.approx(1, abs=1e-6)


async def test_vllm_classify_of_a_bare_string_and_of_token_ids_agree(client):
    text = (await post(client, "/classify", model="sections", input="the fox")).json()
    ids = [2, token_id("the"), token_id("fox"), 3]
    tokens = (await post(client, "/classify", model="sections", input=ids)).json()
    lists = (await post(client, "/classify", model="sections", input=[ids])).json()
    assert text["data"] == tokens["data"] == lists["data"]


async def test_a_multi_label_head_scores_each_label_alone(client, families):
    reply = (await post(client, "/classify", model="topics", input=TEXTS)).json()
    raw = logits(families["topics"], TEXTS)
    got = floats([item["probs"] for item in reply["data"]])
    assert got == pytest.approx(1 / (1 + np.exp(-raw)), rel=1e-5)
    assert got.sum(axis=1).min() > 1.01


async def test_a_regression_head_answers_the_number_itself(client, families):
    reply = (await post(client, "/classify", model="stars", input=TEXTS)).json()
    assert np.array_equal(floats([item["probs"] for item in reply["data"]]), logits(families["stars"], TEXTS))
    assert {(item["label"], item["num_classes"]) for item in reply["data"]} == {("score", 1)}
    [one] = (await post(client, "/predict", model="stars", inputs=TEXTS[0])).json()
    assert one == {"label": "score", "score": reply["data"][0]["probs"][0]}


# TEI's classification.


def ranked(scores: Floats, labels: list[str]) -> list[tuple[str, float]]:
    pairs = [(label, float(score)) for label, score in zip(labels, scores, strict=True)]
    return sorted(pairs, key=lambda pair: -pair[1])


def pairs_of(reply: list[dict[str, object]]) -> list[tuple[object, float]]:
    return [(item["label"], float(np.float32(item["score"]))) for item in reply]  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [False, True], ids=["scores", "raw scores"])
async def test_tei_predict_of_one_text(client, families, raw):
    reply = (await post(client, "/predict", model="sections", inputs=TEXTS[0], raw_scores=raw)).json()
    values = logits(families["sections"], TEXTS[:1])
    task = families["sections"].manifest.task
    assert pairs_of(reply) == ranked((values if raw else probabilities(values, task))[0], task.labels)


async def test_tei_predict_of_a_pair(client, families):
    reply = (await post(client, "/predict", model="sections", inputs=["the fox", "word3"])).json()
    task = families["sections"].manifest.task
    assert pairs_of(reply) == ranked(
        probabilities(logits(families["sections"], [("the fox", "word3")]), task)[0], task.labels
    )


async def test_tei_predict_of_a_batch_of_texts_and_pairs(client, families):
    batch = [["the fox"], ["the fox", "word3"], ["word9"]]
    reply = (await post(client, "/predict", model="sections", inputs=batch)).json()
    task = families["sections"].manifest.task
    scores = probabilities(logits(families["sections"], ["the fox", ("the fox", "word3"), "word9"]), task)
    assert [pairs_of(one) for one in reply] == [ranked(row, task.labels) for row in scores]


async def test_a_batch_of_one_stays_a_batch(client):
    reply = (await post(client, "/predict", model="sections", inputs=[["the fox"]])).json()
    assert isinstance(reply[0], list)
    alone = (await post(client, "/predict", model="sections", inputs="the fox")).json()
    assert reply == [alone]


# TEI's embeddings.


@pytest.mark.parametrize("inputs", [TEXTS, TEXTS[0]], ids=["many", "one"])
async def test_tei_embed(small, families, inputs):
    reply = (await post(small, "/embed", inputs=inputs)).json()
    texts = [inputs] if isinstance(inputs, str) else inputs
    assert np.array_equal(floats(reply), normalized(vectors(families["emb"], texts)))


async def test_tei_embed_of_token_ids_and_fewer_dimensions(small):
    reply = (await post(small, "/embed", inputs=[[5, 6, 7], [8]], dimensions=2)).json()
    values = np.stack([expected(np.array(ids, np.int32), WIDTH) for ids in ([5, 6, 7], [8])])
    assert floats(reply) == pytest.approx(normalized(values[:, :2]), abs=1e-6)


async def test_vectors_that_the_model_normalises_cannot_be_had_otherwise(small, tmp_path):
    response = await small.post("/embed", json={"inputs": "fox", "normalize": False})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "normalize"
    plain = make_fake_family(tmp_path / "plain", task=Task(kind=TaskKind.EMBED, width=4, pooling="mean"))
    async with client_of(make_app([plain])) as client:
        raw = (await post(client, "/embed", inputs="fox word9", normalize=False)).json()
        assert np.array_equal(floats(raw), logits(plain, ["fox word9"]))
        unit = (await post(client, "/embed", inputs="fox word9")).json()
        assert np.array_equal(floats(unit), normalized(logits(plain, ["fox word9"])))


# Truncation.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "emb", "input": ["fox", LONG, LONG]}),
        ("/classify", {"input": ["fox", LONG, LONG]}),
        ("/embed", {"inputs": ["fox", LONG, LONG]}),
        ("/embed", {"inputs": ["fox", LONG, LONG], "truncate": True}),
        ("/predict", {"inputs": [["fox"], [LONG], [LONG, LONG]]}),
        ("/embed", {"inputs": [[5], [5] * 100, [6] * 65]}),
    ],
)
async def test_truncation_is_said_in_the_reply(small, path, body):
    response = await post(small, path, **body)
    assert response.headers["x-fettle-truncated"] == "2"
    if isinstance(response.json(), dict):
        assert response.json()["fettle"]["truncated"] == 2


@pytest.mark.parametrize(
    ("path", "inputs"),
    [("/embed", ["fox", LONG]), ("/embed", [[5] * 65]), ("/predict", LONG), ("/predict", [["fox"], [LONG, LONG]])],
)
async def test_who_asks_for_no_truncation_gets_an_error_instead(small, path, inputs):
    response = await small.post(path, json={"inputs": inputs, "truncate": False})
    assert response.status_code == 400
    assert "the limit is 64" in response.json()["error"]["message"]
    fits = await small.post(path, json={"inputs": "fox", "truncate": False})
    assert fits.status_code == 200
    assert fits.headers["x-fettle-truncated"] == "0"


# Who answers.


async def test_every_reply_says_who_answered_and_where_the_time_went(small):
    response = await post(small, "/classify", input="fox")
    served = response.json()["fettle"]
    assert served["family"] == response.headers["x-fettle-family"] == "sections"
    assert served["variant"] == response.headers["x-fettle-variant"] == "fp32"
    for name in ("tokenize_ms", "queue_ms", "infer_ms"):
        assert served[name] >= 0
        assert response.headers[f"x-fettle-{name.replace('_', '-')}"] == str(served[name])


async def test_a_variant_can_be_pinned(client):
    for model, variant in (("sections", "fp32"), ("sections:fp32", "fp32"), ("sections:int8", "int8")):
        reply = (await post(client, "/classify", model=model, input="fox")).json()
        assert reply["model"] == f"sections:{variant}"
        assert reply["fettle"]["variant"] == variant


async def test_a_request_that_fits_one_family_only_need_not_name_it(small):
    assert (await post(small, "/classify", input="fox")).json()["model"] == "sections:fp32"
    assert (await small.post("/embed", json={"inputs": "fox"})).headers["x-fettle-family"] == "emb"


async def test_a_request_that_fits_several_families_must_name_one(client):
    response = await client.post("/classify", json={"input": "fox"})
    assert response.status_code == 400
    assert "sections" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embeddings", {"model": "sections", "input": "fox"}, 400),
        ("/classify", {"model": "emb", "input": "fox"}, 400),
        ("/classify", {"model": "nobody", "input": "fox"}, 404),
        ("/classify", {"model": "sections:nothing", "input": "fox"}, 404),
        ("/tokenize", {"model": "nobody", "prompt": "fox"}, 404),
    ],
)
async def test_a_model_that_cannot_do_it(client, path, body, status):
    response = await client.post(path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == "model"


async def test_no_family_for_the_task(families):
    async with client_of(make_app([families["emb"]])) as client:
        assert (await client.post("/classify", json={"input": "fox"})).status_code == 404


# Tokens and reading.


async def test_vllm_tokenize(client):
    body = {"model": "sections", "prompt": "the fox unheard", "return_token_strs": True}
    reply = (await post(client, "/tokenize", **body)).json()
    assert reply == {
        "count": 5,
        "max_model_len": 64,
        "tokens": [2, token_id("the"), token_id("fox"), 1, 3],
        "token_strs": ["[CLS]", "the", "fox", "[UNK]", "[SEP]"],
    }
    bare = (await post(client, "/tokenize", model="sections", prompt="the fox", add_special_tokens=False)).json()
    assert bare["tokens"] == [token_id("the"), token_id("fox")]
    assert bare["token_strs"] is None


async def test_tei_tokenize(client):
    reply = (await post(client, "/tokenize", model="emb", inputs=["the fox", "fox"])).json()
    assert [[token["id"] for token in text] for text in reply] == [
        [2, token_id("the"), token_id("fox"), 3],
        [2, token_id("fox"), 3],
    ]
    assert reply[0][0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert reply[0][2] == {"id": token_id("fox"), "text": "fox", "special": False, "start": 4, "stop": 7}
    one = (await post(client, "/tokenize", model="emb", inputs="fox", add_special_tokens=False)).json()
    assert [[token["text"] for token in text] for text in one] == [["fox"]]


async def test_what_tokenize_says_is_what_the_model_gets(client):
    ids = (await post(client, "/tokenize", model="emb", prompt=TEXTS[0])).json()["tokens"]
    by_text = (await post(client, "/v1/embeddings", model="emb", input=TEXTS[0])).json()
    by_ids = (await post(client, "/v1/embeddings", model="emb", input=ids)).json()
    assert by_text["data"] == by_ids["data"]


async def test_models_lists_families_and_variants(small):
    reply = (await small.get("/v1/models")).json()
    assert [card["id"] for card in reply["data"]] == [
        "sections",
        "sections:fp32",
        "sections:int8",
        "emb",
        "emb:fake",
    ]
    assert {card["object"] for card in reply["data"]} == {"model"}


async def test_every_listed_model_answers(client, families):
    for card in (await client.get("/v1/models")).json()["data"]:
        kind = families[card["id"].partition(":")[0]].manifest.task.kind
        path = "/v1/embeddings" if kind is TaskKind.EMBED else "/classify"
        await post(client, path, model=card["id"], input="fox")


async def test_info_tells_what_is_served(small):
    info = (await small.get("/info")).json()
    sections, emb = info["families"]
    assert (sections["name"], sections["task"], sections["labels"]) == (
        "sections",
        "classify",
        ["red", "green", "blue"],
    )
    assert (emb["name"], emb["task"], emb["width"], emb["max_length"]) == ("emb", "embed", WIDTH, 64)
    fp32, int8 = sections["variants"]
    assert (fp32["id"], fp32["default"], fp32["disagreement"]) == ("fp32", True, 0.0)
    assert (int8["id"], int8["default"], int8["disagreement"]) == ("int8", False, 0.02)
    assert fp32["queued"] == fp32["backlog_s"] == 0


async def test_info_counts_what_went_through(small):
    await post(small, "/classify", model="sections:int8", input=TEXTS)
    await post(small, "/classify", model="sections:int8", input="fox")
    info = (await small.get("/info")).json()
    fp32, int8 = info["families"][0]["variants"]
    assert (int8["rows"], int8["batches"]) == (5, 2)
    assert (fp32["rows"], fp32["refused"], fp32["withdrawn"], fp32["retried"]) == (0, 0, 0, 0)


async def test_live_and_ready(small):
    for path in ("/health", "/ready"):
        response = await small.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_the_document_names_every_path(small):
    document = (await small.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/embeddings", "/classify", "/embed", "/predict", "/tokenize", "/detokenize", "/v1/models", "/info",
        "/quality", "/stats", "/health", "/ready",
    }  # fmt: skip
    assert (await small.get("/docs")).status_code == 200
