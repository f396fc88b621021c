"""What text requests may hold: every bad value is a 400 that names its field, and nothing harmless is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from fettle.generation import Sampling
from tests.inprocess import client_of, make_app
from tests.texts import ScriptedSource, make_text_family, says

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TALK = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "Hi"}, CHAT: {"messages": TALK}}
PATHS = pytest.mark.parametrize("path", BODIES)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
# Takes Python's engine ages on a text of "a".
SLOW = "(a+)+$"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory):
    """Its source's calls are `app.state.source.calls`."""
    source = ScriptedSource(says("a"))
    app = make_app([make_text_family(tmp_path_factory.mktemp("family") / "lm")], text_source=source)
    app.state.source = source
    return app


async def post(app, path: str, **fields: Any) -> httpx.Response:
    app.state.source.calls.clear()
    async with client_of(app) as client:
        return await client.post(path, json={**BODIES[path], **fields})


async def refused(app, path: str, **fields: Any) -> dict[str, Any]:
    response = await post(app, path, **fields)
    assert response.status_code == 400, response.text
    assert not app.state.source.calls
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@PATHS
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, "1", True, [1]]),
        ("top_p", [-0.1, 1.1, "1"]),
        ("top_k", [-2, 1.5, 2**31, "1"]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, -1, 101]),
        ("n", [0, -1, 129, 1.0, "2", True]),
        ("max_tokens", [-1, 1.5, "16", 2**31, 0]),
        ("min_tokens", [-1, "1", 2**31]),
        ("seed", [1.5, "1", 2**63, -(2**63) - 1]),
        ("stop", [5, [5], {"a": 1}, "", ["a", ""], ["a"] * 17, "x" * 40_000, ["x" * 20_000] * 2]),
        ("stop_token_ids", [5, ["a"], [-1], [260], [1] * 257]),
        ("logit_bias", [[], {"a": 1}, {"1": 101}, {"1": "1"}, {"-1": 1}, {"1.5": 1}, {"260": 1}, {"²": 1}, {"": 1}]),
        ("logit_bias", [{str(token): 1 for token in range(2000)}]),
        ("stream", [1, "true"]),
        ("ignore_eos", ["yes"]),
        ("include_stop_str_in_output", [1]),
        ("guided_regex", [5, "", "x" * 10_001]),
        ("guided_choice", ["a", [], [""], [5], ["a"] * 1025]),
        ("guided_json", [5, [], "{", "[]"]),
        ("answers", ["majority", 5]),
        ("user", [5]),
        ("priority", ["high", 1]),
        ("max_disagreement", [-1, 2, [], "nosuch"]),
        ("early_stop", [5, {}, {"end_probability": None}]),
        ("unknown", [1, None]),
        ("functions", [[]]),
    ],
)
async def test_a_bad_value_is_refused_by_name(app, path, field, values):
    for value in values:
        error = await refused(app, path, **{field: value})
        assert str(error["param"]).split(".")[0] == field, value
        assert field in error["message"]
        assert len(error["message"]) < 400


@pytest.mark.parametrize("path", [CHAT])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_completion_tokens", [0, -1, "1"]),
        ("logprobs", [1, 5, "true"]),
        ("top_logprobs", [-1, 21, 2]),
        ("messages", [[], "Hi", None, [5]]),
        ("tool_choice", ["always", 5, {"type": "function"}]),
        ("tools", [5, [5]]),
        ("modalities", [["audio"]]),
        ("metadata", [5]),
        ("best_of", [2]),
        ("echo", [True]),
        ("suffix", ["a"]),
        ("prompt", ["a"]),
        ("web_search_options", [{}]),
        ("chat_template", ["{{ messages }}"]),
    ],
)
async def test_a_bad_value_of_a_chat(app, path, field, values):
    for value in values:
        error = await refused(app, path, **{field: value})
        assert str(error["param"]).split(".")[0] == field, value


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt", [None, 5, [], [5, "a"], [[]], [[5], []], [True], [1.5], [-1], [[260]], {}, ["a", 5], ""]),
        ("best_of", [0, 129, "2"]),
        ("echo", [1]),
        ("logprobs", [-1, 21, True, 1.5]),
        ("suffix", ["a", ""]),
        ("messages", [TALK]),
        ("max_completion_tokens", [5]),
    ],
)
async def test_a_bad_value_of_a_completion(app, field, values):
    for value in values:
        error = await refused(app, COMPLETIONS, **{field: value})
        assert error["param"] == field, value


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content"),
        ({"role": "user", "content": "x", "mood": "good"}, "messages.0.mood"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages.0.audio"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, "messages.0.function_call"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "messages.0.tool_calls.0.function"),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
async def test_a_bad_message(app, message, param):
    assert (await refused(app, CHAT, messages=[message]))["param"] == param


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"stream": False, "stream_options": {}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        (COMPLETIONS, {"n": 3, "best_of": 2}, "best_of"),
        (COMPLETIONS, {"answers": "vote"}, "n"),
        (CHAT, {"answers": "vote", "n": 4, "temperature": 0}, "temperature"),
        (COMPLETIONS, {"answers": "vote", "n": 4, "best_of": 8}, "best_of"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
         "response_format.json_schema.name"),
        (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        (COMPLETIONS, {"guided_choice": ["a"], "guided_json": {}}, "response_format"),
        (CHAT, {"early_stop": {"end_probability": 0}}, "early_stop.end_probability"),
        (CHAT, {"early_stop": {"end_probability": 1.1}}, "early_stop.end_probability"),
        (CHAT, {"early_stop": {"answer_confidence": 0.5}}, "early_stop.answer_pattern"),
        (CHAT, {"early_stop": {"answer_confidence": 0.5, "answer_pattern": "("}}, "early_stop.answer_pattern"),
        (CHAT, {"early_stop": {"answer_confidence": 0.5, "answer_pattern": SLOW}}, "early_stop.answer_pattern"),
        (CHAT, {"early_stop": {"reasoning_budget": -1}}, "early_stop.reasoning_budget"),
        (CHAT, {"early_stop": {"reasoning": 1}}, "early_stop.reasoning"),
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "messages"),
        (CHAT, {"chat_template_kwargs": {"_fettle_tick": 1}}, "_fettle_tick"),
    ],
)  # fmt: skip
async def test_fields_that_do_not_fit_each_other(app, path, fields, param):
    assert (await refused(app, path, **fields))["param"] == param


@PATHS
@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_none(app, path, text):
    content = json.dumps({**BODIES[path], "repetition_penalty": 0}).replace('": 0', f'": {text}')
    async with client_of(app) as client:
        response = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "repetition_penalty"


@PATHS
@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400),
        (b'{"prompt": "\xff", "messages": [{"role": "user", "content": "\xff"}]}', "application/json", 400),
        (b'{"guided_json":' + b"[" * 50_000, "application/json", 400),
        (b'{"prompt": "x", "messages": []}', "text/plain", 400),
        (b'{"prompt": "' + b"x" * 3_000_000 + b'"}', "application/json", 413),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_bodies_that_are_none(app, path, content, kind, status):
    async with client_of(app) as client:
        response = await client.post(path, content=content, headers={"content-type": kind})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


HARMLESS = {
    "user": "me",
    "n": None,
    "stop": None,
    "seed": None,
    "logit_bias": None,
    "response_format": {"type": "text"},
}
HARMLESS_CHAT = {
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "safety_identifier": "me",
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "auto",
    "logprobs": False,
}


async def test_what_is_harmless_changes_nothing(app):
    for path, more in ((COMPLETIONS, HARMLESS), (CHAT, HARMLESS | HARMLESS_CHAT)):
        assert (await post(app, path)).status_code == 200
        [plain] = app.state.source.calls
        response = await post(app, path, **more)
        assert response.status_code == 200, response.text
        [call] = app.state.source.calls
        assert call.sampling == plain.sampling == Sampling()
        assert (call.grammar, call.stop, call.choices) == (None, (), 1)
        assert [ids.tolist() for ids in call.prompts] == [ids.tolist() for ids in plain.prompts]


async def test_every_field_of_openai_as_null(app):
    fields = ["stream", "stream_options", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty"]
    for path in BODIES:
        nulls = dict.fromkeys([*fields, "logprobs", "seed", "stop", "n", "logit_bias"])
        assert (await post(app, path, **nulls)).status_code == 200


@PATHS
async def test_everything_that_a_request_can_say_of_sampling_reaches_the_call(app, path):
    response = await post(
        app, path, temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, presence_penalty=1, frequency_penalty=-1.5,
        repetition_penalty=1.1, logit_bias={"5": -100, "6": 2.5}, seed=7, n=2, max_tokens=20, min_tokens=3,
        stop=["END", "x" * 10_000], stop_token_ids=[7, 8], include_stop_str_in_output=True, ignore_eos=True,
    )  # fmt: skip
    assert response.status_code == 200, response.text
    [call] = app.state.source.calls
    assert call.sampling == Sampling(0.5, 0.9, 40, 0.05, 1.0, -1.5, 1.1, {5: -100, 6: 2.5}, 7, None)
    assert (call.choices, call.max_tokens, call.min_tokens, call.stop_ids) == (2, 20, 3, {7, 8})
    assert (call.stop[0], len(call.stop[1])) == ("END", 10_000)
    assert call.keep_stop
    assert call.ignore_end


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"top_p": 0}, Sampling(top_k=1)),
        ({"top_k": -1}, Sampling()),
        ({"top_k": 0}, Sampling()),
        ({"temperature": 0}, Sampling(temperature=0.0)),
        ({"seed": -1}, Sampling(seed=2**63 - 1)),
        ({"seed": 2**63 - 1}, Sampling(seed=2**63 - 1)),
        ({"seed": -(2**63)}, Sampling(seed=0)),
    ],
)
async def test_values_that_mean_another(app, fields, sampling):
    await post(app, COMPLETIONS, **fields)
    assert app.state.source.calls[0].sampling == sampling


async def test_logprobs_of_either_kind(app):
    for path, fields, wanted in (
        (COMPLETIONS, {"logprobs": 0}, 0),
        (COMPLETIONS, {"logprobs": 20}, 20),
        (COMPLETIONS, {}, None),
        (CHAT, {"logprobs": True}, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20),
        (CHAT, {"logprobs": False}, None),
    ):
        assert (await post(app, path, **fields)).status_code == 200
        assert app.state.source.calls[0].sampling.logprobs == wanted


async def test_limits_of_a_chat_by_either_name(app):
    for fields, wanted in (
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
    ):
        assert (await post(app, CHAT, **fields)).status_code == 200
        assert app.state.source.calls[0].max_tokens == wanted


@PATHS
@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
         "json_schema", SCHEMA),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "[a-z]+"}, "regex", "[a-z]+"),
        ({"guided_choice": ["yes", "no"]}, "choice", ("yes", "no")),
    ],
)  # fmt: skip
async def test_what_a_text_has_to_be(app, path, fields, kind, value):
    assert (await post(app, path, **fields)).status_code == 200
    grammar = app.state.source.calls[0].grammar
    assert grammar.kind == kind
    assert (json.loads(grammar.value) if kind == "json_schema" else grammar.value) == value


@PATHS
async def test_a_clients_own_thresholds(app, path):
    given = {
        "end_probability": 0.5,
        "answer_confidence": 0.9,
        "answer_pattern": r"answer is:? (\w+)",
        "reasoning_budget": 100,
    }
    assert (await post(app, path, early_stop=given)).status_code == 200
    early = app.state.source.calls[0].early_stop
    assert {name: getattr(early, name) for name in given} == given
