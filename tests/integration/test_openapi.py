"""Requests made from the OpenAPI document, right ones and wrong ones: no 5xx, and replies as documented."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fakes import classify_task, embed_task, make_fake_family
from tests.inprocess import make_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
]
POSTED = ["/v1/embeddings", "/classify", "/embed", "/predict", "/tokenize", "/detokenize"]
READ = ["/v1/models", "/info", "/quality", "/stats", "/health", "/ready"]
EXAMPLES = 60


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    where = tmp_path_factory.mktemp("families")
    families = [
        make_fake_family(where / "s", name="sections", task=classify_task()),
        make_fake_family(where / "e", name="emb", task=embed_task(4)),
    ]
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(families))


def test_every_path_is_tried(document):
    assert {operation.ok().path for operation in document.get_all_operations()} == {*POSTED, *READ}


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_posting_is_as_documented(document, path, mode):
    answered = 0

    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES)
    def try_one(case: schemathesis.Case) -> None:
        nonlocal answered
        # A made-up model is a 404 whatever else is in the request: most requests name one that exists.
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) != 1:
            case.body["model"] = "emb" if "embed" in path else "sections"
        # So is a token outside the vocabulary a 400.
        if mode is GenerationMode.POSITIVE and path == "/detokenize":
            case.body["tokens"] = [token % 200 for token in case.body["tokens"]]
        answered += case.call_and_validate(checks=CHECKS).status_code == 200

    try_one()
    assert (answered > 0) == (mode is GenerationMode.POSITIVE)


@pytest.mark.parametrize("path", READ)
def test_reading_is_as_documented(document, path):
    response = document[path]["GET"].Case().call_and_validate(checks=CHECKS)
    assert response.status_code == 200
