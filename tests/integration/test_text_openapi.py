"""Text requests made from the OpenAPI document, right ones and wrong ones: no 5xx, and replies as documented."""

from __future__ import annotations

from itertools import cycle

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.inprocess import make_app
from tests.texts import ScriptedSource, make_text_family, says

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
EXAMPLES = 60
TALK = [{"role": "user", "content": "Hi"}]
# What is right by itself may not fit the model, or another field.
DEPENDING = [
    "model", "max_disagreement", "stop_token_ids", "logit_bias", "best_of", "min_tokens", "max_tokens", "answers",
    "stream_options", "guided_json", "tool_choice", "chat_template_kwargs", "continue_final_message", "early_stop",
    "max_completion_tokens", "top_logprobs", "response_format",
]  # fmt: skip


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    family = make_text_family(tmp_path_factory.mktemp("family") / "lm")
    app = make_app([family], text_source=ScriptedSource(says("Grüße", "two")))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_posting_is_as_documented(document, path, mode):
    answered: set[str] = set()
    streams = cycle([True, False])

    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES)
    def try_one(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE:
            for field in DEPENDING:
                case.body.pop(field, None)
            case.body["stream"] = next(streams)
            case.body["messages" if "chat" in path else "prompt"] = TALK if "chat" in path else "Hi"
        response = case.call_and_validate(checks=CHECKS)
        if response.status_code == 200:
            answered.update(response.headers["content-type"])

    try_one()
    kinds = {"application/json", "text/event-stream; charset=utf-8"}
    assert answered == (kinds if mode is GenerationMode.POSITIVE else set())
