"""The `openai` client gets embeddings unchanged from a running service."""

from __future__ import annotations

import numpy as np
import openai
import pytest

from fettle.answers import Floats, normalized
from tests.conftest import TASKS
from tests.fakes import CLS, SEP, token_id
from tests.integration.service import Service
from workers.fake import expected

pytestmark = pytest.mark.slow

WORDS = [["the", "fox"], ["word7"], ["quick", "brown", "fox"]]
TEXTS = [" ".join(words) for words in WORDS]


@pytest.fixture
def client(served: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="not-needed", max_retries=0)


def vectors() -> Floats:
    ids = [np.array([CLS, *map(token_id, words), SEP], np.int32) for words in WORDS]
    return normalized(np.stack([expected(row, TASKS["emb"].width) for row in ids]))


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=repr)
def test_embeddings(client: openai.OpenAI, options: dict[str, str]):
    """Without an option the client asks for base64 and decodes it."""
    reply = client.embeddings.create(model="emb", input=TEXTS, **options)
    assert [item.index for item in reply.data] == [0, 1, 2]
    assert reply.usage.prompt_tokens == sum(len(words) + 2 for words in WORDS)
    if options.get("encoding_format") != "base64":
        assert np.array_equal(np.array([item.embedding for item in reply.data], np.float32), vectors())


def test_dimensions_and_token_ids(client: openai.OpenAI):
    ids = [CLS, token_id("the"), token_id("fox"), SEP]
    reply = client.embeddings.create(model="emb:int8", input=[ids], dimensions=4)
    assert reply.data[0].embedding == pytest.approx(normalized(vectors()[:1, :4])[0].tolist(), abs=1e-7)
    assert reply.model == "emb:int8"


def test_models_and_errors(client: openai.OpenAI):
    assert "emb" in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="nobody", input="fox")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.embeddings.create(model="emb", input=[""])
    assert wrong.value.param == "input"
