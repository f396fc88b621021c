"""Text over HTTP: whole replies, streams, errors before and within them, and clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from deployments import streams
from deployments.router import Client
from deployments.text_source import Piece, Spent, TextCall, Votes
from fettle.config import LimitConfig
from fettle.errors import DeadlineError, EngineError, OverloadedError, RequestError, UnavailableError
from fettle.family import Family
from fettle.generation import Finish
from tests.fakes import make_fake_family
from tests.inprocess import client_of, make_app
from tests.texts import (
    BOS,
    CONTEXT,
    IM_END,
    IM_START,
    Script,
    ScriptedSource,
    framed,
    ids_of,
    make_text_family,
    pieces_of,
    says,
)

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "Grüße 漢字!"
TALK = [{"role": "user", "content": "Hi"}]
PATHS = pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": "Hi"}), (CHAT, {"messages": TALK})])


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Family]:
    where = tmp_path_factory.mktemp("families")
    return [
        make_text_family(where / "lm"),
        make_text_family(where / "bare", name="bare", template=None),
        make_fake_family(where / "sections", name="sections"),
    ]


def serving(families: list[Family], script: Script, **settings: Any) -> tuple[ScriptedSource, FastAPI]:
    source = ScriptedSource(script)
    return source, make_app(families, text_source=source, **settings)


async def ask(app: FastAPI, path: str, *, status: int = 200, headers: dict[str, str] | None = None, **body: Any) -> Any:
    async with client_of(app) as client:
        response = await client.post(path, json={"model": "lm", **body}, headers=headers)
    assert response.status_code == status, response.text
    return response


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, `[DONE]` as it is."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


# Whole replies.


async def test_a_completion(families):
    source, app = serving(families, says(TEXT))
    response = await ask(app, COMPLETIONS, prompt="Hi")
    reply = response.json()
    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")
    assert reply["model"] == "lm:bf16"
    assert isinstance(reply["created"], int)
    [choice] = reply["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (TEXT, "stop", None)
    size = len(TEXT.encode())
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": size,
        "total_tokens": size + 2,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert reply["fettle"]["bound"] == response.headers["x-fettle-bound"] == "exact"
    assert reply["fettle"]["infer_ms"] == 20.0
    [call] = source.calls
    assert call.prompts[0].tolist() == ids_of("Hi")
    assert (call.max_tokens, call.stream, call.sampling.temperature, call.sampling.logprobs) == (16, False, 1.0, None)
    assert source.open_calls == 0


async def test_a_chat_completion(families):
    source, app = serving(families, says(TEXT))
    reply = (await ask(app, CHAT, messages=TALK)).json()
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    [choice] = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    [call] = source.calls
    wanted = [IM_START, *ids_of("user\nHi"), IM_END, *ids_of("\n"), IM_START, *ids_of("assistant\n")]
    assert call.prompts[0].tolist() == wanted
    # To the end of the context.
    assert call.max_tokens is None


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [ids_of("ab")]),
        (["ab", "c"], [ids_of("ab"), ids_of("c")]),
        ([5, 6, BOS], [[5, 6, BOS]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_prompts_of_every_kind(families, prompt, ids):
    source, app = serving(families, says("one", "two"))
    reply = (await ask(app, COMPLETIONS, prompt=prompt)).json()
    assert [call.tolist() for call in source.calls[0].prompts] == ids
    assert [choice["text"] for choice in reply["choices"]] == ["one", "two"][: len(ids)]
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_several_choices_of_several_prompts_are_told_in_order(families):
    def backwards(call: TextCall) -> list[Piece]:
        return framed([piece for number in (3, 1, 2, 0) for piece in pieces_of(call, number, f"text {number}")])

    _, app = serving(families, backwards)
    reply = (await ask(app, COMPLETIONS, prompt=["a", "b"], n=2)).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == [f"text {number}" for number in range(4)]


async def test_the_best_of_several_candidates(families):
    """Candidate k of prompt p has tokens of log-probability -(4 p + k + 1) % 3."""

    def script(call: TextCall) -> list[Piece]:
        pieces = []
        for number in range(call.answers):
            whole = pieces_of(call, number, f"text {number}", size=99)[0]
            told = tuple(replace(each, logprob=-((number + 1) % 3) - 1.0) for each in whole.tokens)
            pieces.append(replace(whole, tokens=told))
        return framed(pieces)

    source, app = serving(families, script)
    reply = (await ask(app, COMPLETIONS, prompt=["a", "b"], n=2, best_of=4)).json()
    assert [choice["text"] for choice in reply["choices"]] == ["text 2", "text 0", "text 5", "text 6"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert {choice["logprobs"] for choice in reply["choices"]} == {None}
    assert reply["usage"]["completion_tokens"] == 8 * len("text 0")
    assert source.calls[0].sampling.logprobs == 0


async def test_echo_with_logprobs_scores_the_prompt(families):
    source, app = serving(families, says("xyz"))
    reply = (await ask(app, COMPLETIONS, prompt=["ab", "cde"], echo=True, logprobs=1)).json()
    first, second = reply["choices"]
    assert (first["text"], second["text"]) == ("abxyz", "cdexyz")
    assert first["logprobs"]["tokens"] == list("abxyz")
    assert first["logprobs"]["token_logprobs"][0] is None
    assert second["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert source.calls[0].prompt_logprobs
    alone = (await ask(app, COMPLETIONS, prompt="ab", echo=True, logprobs=1, max_tokens=0)).json()
    assert alone["choices"][0]["text"] == "ab"
    assert alone["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert alone["usage"]["completion_tokens"] == 0
    ids = (await ask(app, COMPLETIONS, prompt=[IM_START, *ids_of("b")], echo=True)).json()
    assert ids["choices"][0]["text"] == "<|im_start|>bxyz"


async def test_a_vote_has_one_choice_a_prompt(families):
    def script(call: TextCall) -> list[Piece]:
        pieces = [piece for number in range(call.answers) for piece in pieces_of(call, number, "42")]
        return framed(pieces, spent=Spent(30, votes=(Votes(5, 4), Votes(8, 5))))

    source, app = serving(families, script)
    reply = (await ask(app, COMPLETIONS, prompt=["a", "b"], n=8, answers="vote")).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["fettle"]["votes"] == [{"drawn": 5, "won": 4}, {"drawn": 8, "won": 5}]
    assert (source.calls[0].choices, source.calls[0].vote) == (8, True)


async def test_why_a_text_ended_is_told_exactly(families):
    def script(call: TextCall) -> list[Piece]:
        return framed(
            [
                *pieces_of(call, 0, "a", finish=Finish.EARLY_ANSWER),
                *pieces_of(call, 1, "b", finish=Finish.CONTEXT),
                *pieces_of(call, 2, "c", stopped_by="END"),
            ]
        )

    _, app = serving(families, script)
    body = {"messages": TALK, "n": 3, "early_stop": {"end_probability": 0.5}}
    response = await ask(app, CHAT, **body)
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length", "stop"]
    assert [choice["fettle"]["finish"] for choice in choices] == ["early_answer", "context", "stop"]
    assert choices[2]["stop_reason"] == "END"
    assert response.headers["x-fettle-early-stop"] == "uncertified"
    assert response.headers["x-fettle-bound"] == "none"


# Streams.


async def test_a_streamed_completion(families):
    source, app = serving(families, says(TEXT, size=2))
    response = await ask(app, COMPLETIONS, prompt="Hi", stream=True)
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk.get("fettle") is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["fettle"]["infer_ms"] == 20.0
    assert response.headers["x-fettle-variant"] == "bf16"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    assert source.calls[0].stream


async def test_a_streamed_chat_with_usage(families):
    _, app = serving(families, says("eins", "zwei", size=2))
    response = await ask(app, CHAT, messages=TALK, n=2, stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events(response)
    assert done == "[DONE]"
    texts = {0: "", 1: ""}
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["usage"] is None
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "eins", 1: "zwei"}
    firsts = [next(c for c in chunks if c["choices"][0]["index"] == index) for index in (0, 1)]
    assert [chunk["choices"][0]["delta"] for chunk in firsts] == [{"role": "assistant", "content": ""}] * 2
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert last["fettle"]["infer_ms"] == 20.0


async def test_a_stream_tells_what_the_whole_reply_would(families):
    _, app = serving(families, says(TEXT, size=3))
    body = {"prompt": ["a", "bb"], "echo": True, "logprobs": 1, "n": 2}
    whole = (await ask(app, COMPLETIONS, **body)).json()["choices"]
    chunks = events(await ask(app, COMPLETIONS, **body, stream=True))[:-1]
    for choice in whole:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, told in choice["logprobs"].items():
            assert [item for part in own if part["logprobs"] for item in part["logprobs"][name]] == told


async def test_the_end_may_come_without_a_text_of_its_own(families):
    def script(call: TextCall) -> list[Piece]:
        pieces = pieces_of(call, 0, "ab")
        return framed([*pieces, Piece(0)])

    _, app = serving(families, script)
    *chunks, done = events(await ask(app, COMPLETIONS, prompt="x", stream=True))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab"
    assert (await ask(app, COMPLETIONS, prompt="x")).json()["choices"][0]["text"] == "ab"


# Errors.

FAILURES = [
    (OverloadedError("full; retry in 3 s", retry_after_s=3), 429, "overloaded"),
    (DeadlineError("too late"), 504, "deadline"),
    (RequestError("the grammar is none", param="guided_regex"), 400, "invalid_request"),
    (EngineError("the engine failed"), 500, "engine_failed"),
    (UnavailableError("no replica"), 503, "unavailable"),
]


@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=[code for *_, code in FAILURES])
async def test_what_fails_before_the_first_piece_has_its_status(families, path, body, stream, error, status, code):
    source, app = serving(families, lambda call: [error])
    response = await ask(app, path, status=status, **body, stream=stream)
    assert response.json()["error"]["code"] == code
    assert response.headers["content-type"] == "application/json"
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)
    assert source.open_calls == 0


@PATHS
@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=[code for *_, code in FAILURES])
async def test_what_fails_later_ends_a_stream_with_an_event(families, path, body, error, status, code):
    source, app = serving(families, lambda call: [*framed(pieces_of(call, 0, "abcdefgh"))[:1], error])
    *chunks, failure, done = events(await ask(app, path, **body, stream=True))
    assert chunks
    assert failure["error"]["code"] == code
    assert failure["error"]["message"] == str(error)
    assert done == "[DONE]"
    assert source.open_calls == 0
    response = await ask(app, path, status=status, **body)
    assert response.json()["error"]["code"] == code


@PATHS
async def test_a_bug_in_a_stream_tells_nothing(families, path, body, caplog):
    _, app = serving(families, lambda call: [*framed(pieces_of(call, 0, "abcdefgh"))[:1], KeyError("secret")])
    with caplog.at_level(logging.ERROR, "ray.serve.fettle"):
        *_, failure, done = events(await ask(app, path, **body, stream=True))
    assert failure["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(failure)
    assert "secret" in caplog.text
    assert done == "[DONE]"
    assert "secret" not in (await ask(app, path, status=500, **body)).text


@PATHS
@pytest.mark.parametrize("pieces", [0, 1], ids=["nothing", "a beginning"])
async def test_a_text_that_breaks_off_is_no_answer(families, path, body, pieces):
    _, app = serving(families, lambda call: framed(pieces_of(call, 0, "abcdefgh"))[:pieces])
    assert (await ask(app, path, status=503, **body)).json()["error"]["code"] == "unavailable"
    if pieces:
        *_, failure, _ = events(await ask(app, path, **body, stream=True))
        assert failure["error"]["code"] == "unavailable"
    else:
        await ask(app, path, status=503, **body, stream=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_without_an_end_is_no_answer(families, stream):
    def script(call: TextCall) -> list[Piece]:
        return framed([*pieces_of(call, 0, "a"), replace(pieces_of(call, 1, "b")[0], finish=None)])

    _, app = serving(families, script)
    response = await ask(app, COMPLETIONS, status=200 if stream else 503, prompt="x", n=2, stream=stream)
    if stream:
        assert events(response)[-2]["error"]["code"] == "unavailable"


async def test_a_stream_ends_the_call(families):
    """Also one whose source would have more to say."""

    def script(call: TextCall) -> list[Piece | asyncio.Event]:
        return [*framed(pieces_of(call, 0, "ab")), asyncio.Event()]

    source, app = serving(families, script)
    assert events(await ask(app, COMPLETIONS, prompt="x", stream=True))[-1] == "[DONE]"
    assert source.open_calls == 0


# What is refused before anything is generated; fields by themselves are in test_text_schemas.


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (COMPLETIONS, {"prompt": "x" * CONTEXT}, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": ["x", "x" * 500], "max_tokens": 20}, "max_tokens", "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages", "context_length_exceeded"),
        (CHAT, {"messages": TALK, "max_completion_tokens": CONTEXT}, "max_tokens", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "invalid_request"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt", "invalid_request"),
        (COMPLETIONS, {"prompt": [5, 260]}, "prompt", "invalid_request"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [260]}, "stop_token_ids", "invalid_request"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"260": 1}}, "logit_bias", "invalid_request"),
        (COMPLETIONS, {"prompt": "x", "stream": True, "best_of": 2}, "best_of", "invalid_request"),
        (CHAT, {"messages": TALK, "model": "bare"}, "messages", "invalid_request"),
        (CHAT, {"messages": TALK, "model": "sections"}, "model", "invalid_request"),
        (COMPLETIONS, {"prompt": "x", "model": "sections"}, "model", "invalid_request"),
        (
            COMPLETIONS,
            {"prompt": "x", "model": "lm:int4", "max_disagreement": 0.1},
            "max_disagreement",
            "invalid_request",
        ),
    ],
)
async def test_what_does_not_fit_the_model_is_refused_before_anything_is_generated(families, path, body, param, code):
    source, app = serving(families, says("no"))
    error = (await ask(app, path, status=400, **body)).json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert not source.calls


async def test_the_last_token_of_the_context_can_be_had(families):
    source, app = serving(families, says("a"))
    await ask(app, COMPLETIONS, prompt="x" * (CONTEXT - 1), max_tokens=1)
    # A limit that the client did not set is no reason to refuse.
    await ask(app, COMPLETIONS, prompt="x" * (CONTEXT - 1))
    assert [call.max_tokens for call in source.calls] == [1, 16]


async def test_more_choices_than_a_request_may_have(families):
    source, app = serving(families, says("a"), limits=LimitConfig(max_inputs=8))
    await ask(app, COMPLETIONS, prompt=["x"] * 4, n=2)
    await ask(app, COMPLETIONS, status=413, prompt=["x"] * 4, n=3)
    await ask(app, COMPLETIONS, status=413, prompt=["x"] * 4, n=1, best_of=3)
    await ask(app, COMPLETIONS, status=413, prompt=[[5]] * 9)
    await ask(app, CHAT, status=413, messages=TALK, n=9)
    assert len(source.calls) == 1


async def test_a_pinned_variant_a_class_and_a_deadline_reach_the_call(families):
    source, app = serving(families, says("a"))
    await ask(
        app, COMPLETIONS, prompt="x", model="lm:int4", priority="batch", headers={"x-request-timeout-seconds": "5"}
    )
    await ask(app, CHAT, messages=TALK, max_disagreement="exact", headers={"x-request-timeout-seconds": "5"})
    first, second = (call.asked for call in source.calls)
    assert first.quality.variant == "int4"
    assert first.terms.priority == 1
    assert second.quality.tolerance == 0
    assert 4 < second.terms.deadline - second.terms.arrived < 5
    await ask(app, CHAT, status=400, messages=TALK, headers={"x-request-timeout-seconds": "soon"})


async def test_keys_are_needed_here_too(families):
    source, app = serving(families, says("a"), clients={"a-long-secret": Client("me")})
    await ask(app, COMPLETIONS, status=401, prompt="x")
    await ask(app, COMPLETIONS, prompt="x", headers={"authorization": "Bearer a-long-secret"})
    assert source.calls[0].asked.client.name == "me"


async def test_without_a_model_the_only_one_that_generates_answers(tmp_path, families):
    _, app = serving([families[0], families[2]], says("a"))
    async with client_of(app) as client:
        assert (await client.post(COMPLETIONS, json={"prompt": "x"})).json()["model"] == "lm:bf16"


async def test_without_a_family_that_generates_there_are_no_such_paths(families):
    async with client_of(serving([families[2]], says("a"))[1]) as client:
        assert (await client.post(COMPLETIONS, json={"prompt": "x"})).status_code == 404
        assert CHAT not in (await client.get("/openapi.json")).json()["paths"]
    async with client_of(serving(families, says("a"))[1]) as client:
        assert {CHAT, COMPLETIONS} <= set((await client.get("/openapi.json")).json()["paths"])
        assert (await client.get(CHAT)).status_code == 405


# Tools.

TOOL = {
    "type": "function",
    "function": {"name": "size", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}},
}
OTHER_TOOL = {"type": "function", "function": {"name": "now"}}


async def test_a_tool_that_has_to_be_called_is_a_grammar(families):
    source, app = serving(families, says('{"of": "fox"}', size=3))
    choice = {"type": "function", "function": {"name": "size"}}
    body = {"messages": TALK, "tools": [TOOL, OTHER_TOOL], "tool_choice": choice}
    [told] = (await ask(app, CHAT, **body)).json()["choices"]
    assert told["finish_reason"] == "tool_calls"
    [called] = told["message"]["tool_calls"]
    assert called["function"] == {"name": "size", "arguments": '{"of": "fox"}'}
    assert told["message"]["content"] is None
    grammar = source.calls[0].grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(str(grammar.value))) == ("json_schema", TOOL["function"]["parameters"])
    chunks = events(await ask(app, CHAT, **body, stream=True))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert parts[0]["function"]["name"] == "size"
    assert parts[0]["id"].startswith("call_")
    assert "".join(part["function"]["arguments"] for part in parts) == '{"of": "fox"}'
    assert all("id" not in part for part in parts[1:])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_any_tool_that_has_to_be_called(families, stream):
    source, app = serving(families, says('{"name": "now", "arguments": {}}', size=5))
    body = {"messages": TALK, "tools": [TOOL, OTHER_TOOL], "tool_choice": "required"}
    response = await ask(app, CHAT, **body, stream=stream)
    if stream:
        told = [c["choices"][0]["delta"].get("tool_calls") for c in events(response)[:-1]]
        [called] = next(part for part in told if part)
    else:
        [called] = response.json()["choices"][0]["message"]["tool_calls"]
    assert called["function"] == {"name": "now", "arguments": "{}"}
    grammar = source.calls[0].grammar
    assert grammar is not None
    assert [option["properties"]["name"] for option in json.loads(str(grammar.value))["anyOf"]] == [
        {"const": "size"},
        {"const": "now"},
    ]


async def test_tools_that_may_be_called_are_the_templates(tmp_path):
    template = "{{ tools | tojson if tools else '-' }}<tool_call>{{ messages[0].content }}"
    family = make_text_family(tmp_path / "lm", template=template)
    source, app = serving(
        [family], says('Well.<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>', size=3)
    )
    [told] = (await ask(app, CHAT, messages=TALK, tools=[OTHER_TOOL])).json()["choices"]
    assert told["message"]["content"] == "Well."
    assert told["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a":1}'}
    assert told["finish_reason"] == "tool_calls"
    [none] = (await ask(app, CHAT, messages=TALK, tools=[OTHER_TOOL], tool_choice="none")).json()["choices"]
    assert "<tool_call>" in none["message"]["content"]
    tokenizer = source.calls[0].asked.family.tokenizer
    prompts = [tokenizer.text(call.prompts[0].tolist()) for call in source.calls]
    assert prompts[0].startswith(json.dumps([OTHER_TOOL]))
    assert prompts[1].startswith("-<tool_call>")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "size"}}},
        {"tools": [OTHER_TOOL], "tool_choice": {"type": "function", "function": {"name": "size"}}},
        {"tools": [OTHER_TOOL], "tool_choice": "sometimes"},
    ],
)
async def test_a_tool_that_is_not_there(families, fields):
    _, app = serving(families, says("a"))
    error = (await ask(app, CHAT, status=400, messages=TALK, **fields)).json()["error"]
    assert error["param"] == "tool_choice"


# Conversations and tokens.


async def test_a_conversation_reaches_the_template_as_it_expects(tmp_path):
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{{ effort }}{{ reasoning_effort }}"
    source, app = serving([make_text_family(tmp_path / "lm", template=template)], says("a"))
    call = {"id": "c1", "type": "function", "function": {"name": "size", "arguments": '{"of": "fox"}'}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    settings = {"effort": "much"}
    await ask(app, CHAT, messages=messages, chat_template_kwargs=settings, reasoning_effort="low")
    prompt = source.calls[0].asked.family.tokenizer.text(source.calls[0].prompts[0].tolist())
    *lines, last = prompt.split("\n")
    assert [json.loads(line) for line in lines] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "tool_calls": [{**call, "function": {"name": "size", "arguments": {"of": "fox"}}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert last == "muchlow"


async def test_a_last_message_may_be_continued(families):
    source, app = serving(families, says("a"))
    messages = [*TALK, {"role": "assistant", "content": "The answer"}]
    await ask(app, CHAT, messages=messages, continue_final_message=True, add_generation_prompt=False)
    prompt = source.calls[0].asked.family.tokenizer.text(source.calls[0].prompts[0].tolist())
    assert prompt.endswith("<|im_start|>assistant\nThe answer")
    for wrong in ({"add_generation_prompt": True}, {"messages": TALK}):
        body = {"messages": messages, "continue_final_message": True, **wrong}
        error = (await ask(app, CHAT, status=400, **body)).json()["error"]
        assert error["param"] == "continue_final_message"


async def test_a_very_long_conversation_is_rendered_beside_the_loop(tmp_path):
    _, app = serving([make_text_family(tmp_path / "lm", context=50_000)], says("a"))
    reply = (await ask(app, CHAT, messages=[{"role": "user", "content": "x" * 30_000}])).json()
    assert reply["usage"]["prompt_tokens"] > 30_000


async def test_tokenize_and_detokenize(families):
    _, app = serving(families, says("a"))
    chat = (await ask(app, "/tokenize", messages=TALK, return_token_strs=True)).json()
    assert chat["tokens"][0] == IM_START
    assert chat["token_strs"][0] == "<|im_start|>"
    assert (chat["count"], chat["max_model_len"]) == (len(chat["tokens"]), CONTEXT)
    text = (await ask(app, "/detokenize", tokens=chat["tokens"])).json()
    assert text == {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}
    plain = (await ask(app, "/tokenize", prompt="Hi")).json()
    assert plain["tokens"] == ids_of("Hi")
    short = (await ask(app, "/tokenize", messages=TALK, add_generation_prompt=False)).json()
    assert short["count"] < chat["count"]
    assert (await ask(app, "/detokenize", status=400, tokens=[260])).json()["error"]["param"] == "tokens"
    assert (await ask(app, "/tokenize", status=400, messages=TALK, model="bare")).json()["error"]["param"] == "messages"
    bad = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert (await ask(app, "/tokenize", status=400, messages=bad)).json()["error"]["param"] == "messages.0.content"


async def test_models_say_how_much_they_can_take(families):
    async with client_of(serving(families, says("a"))[1]) as client:
        cards = (await client.get("/v1/models")).json()["data"]
    assert {card["id"]: card["max_model_len"] for card in cards}["lm:int4"] == CONTEXT


# Clients that leave, and clients that read slowly. Seen from the server, so that it is known when.


class Connection:
    """One request as an ASGI server gives it to the application; `leave` is the client's."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self.left = asyncio.Event()
        self.broken = False
        self._messages = [{"type": "http.request", "body": json.dumps({"model": "lm", **body}).encode()}]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.ready.wait()
        if self.broken:
            raise OSError("connection reset")
        self.sent.append(message)


async def settle() -> None:
    """Give everything that can go on the turns to do so."""
    for _ in range(200):
        await asyncio.sleep(0)


@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True], ids=["before the first piece", "within"])
async def test_a_client_that_leaves_ends_its_call_at_once(families, path, body, stream, begun):
    def script(call: TextCall) -> list[Piece | asyncio.Event]:
        return [*(framed(pieces_of(call, 0, "abcdefgh"))[:1] if begun else []), asyncio.Event()]

    source, app = serving(families, script)
    connection = Connection(app, path, {**body, "stream": stream})
    await source.opened.wait()
    await settle()
    assert source.open_calls == 1
    assert bool(connection.sent) == (stream and begun)
    connection.left.set()
    await asyncio.wait_for(connection.task, 5)
    assert source.open_calls == 0
    assert b"[DONE]" not in connection.body


async def test_a_client_that_leaves_while_a_block_is_on_its_way(families):
    source, app = serving(families, says("x" * 400, size=1))
    connection = Connection(app, COMPLETIONS, {"prompt": "x", "stream": True})
    connection.ready.clear()
    await source.opened.wait()
    await settle()
    connection.left.set()
    await asyncio.wait_for(connection.task, 5)
    assert source.open_calls == 0
    assert not connection.sent


async def test_a_server_that_gives_up_ends_the_call(families):
    for stream in (False, True):
        source, app = serving(families, lambda call: [*framed(pieces_of(call, 0, "abcdefgh"))[:1], asyncio.Event()])
        connection = Connection(app, COMPLETIONS, {"prompt": "x", "stream": stream})
        await source.opened.wait()
        await settle()
        connection.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connection.task
        assert source.open_calls == 0


async def test_a_broken_connection_ends_the_call(families):
    source, app = serving(families, says("x" * 100, size=1))
    connection = Connection(app, COMPLETIONS, {"prompt": "x", "stream": True})
    connection.broken = True
    await asyncio.wait_for(connection.task, 5)
    assert len(source.calls) == 1
    assert source.open_calls == 0


async def test_a_client_that_stops_reading_stops_its_source(families):
    """No more is asked for than what is on its way to the client."""
    source, app = serving(families, says("x" * 400, size=1))
    connection = Connection(app, COMPLETIONS, {"prompt": "x", "stream": True})
    while len(connection.sent) < 20:
        await asyncio.sleep(0)
    connection.ready.clear()
    await settle()
    pulled = source.pulled
    assert pulled <= len(connection.sent) + 2
    await settle()
    assert source.pulled == pulled
    connection.ready.set()
    await asyncio.wait_for(connection.task, 10)
    assert source.pulled == 400
    assert connection.body.endswith(b"data: [DONE]\n\n")


async def test_a_reader_that_takes_nothing_is_given_up(families, monkeypatch):
    monkeypatch.setattr(streams, "STALLED_S", 0.05)
    source, app = serving(families, says("x" * 400, size=1))
    connection = Connection(app, CHAT, {"messages": TALK, "stream": True})
    while len(connection.sent) < 10:
        await asyncio.sleep(0)
    connection.ready.clear()
    await asyncio.wait_for(connection.task, 10)
    assert source.open_calls == 0
    assert source.pulled < 400
    assert b"[DONE]" not in connection.body


@pytest.fixture
async def server(families: list[Family]) -> AsyncIterator[tuple[ScriptedSource, int]]:
    """The application behind a real server."""
    source, app = serving(families, says("x" * 200_000, size=100))
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    yield source, running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    running.force_exit = True
    await task


async def test_over_a_socket_a_slow_reader_holds_little_and_its_end_is_seen(server):
    source, port = server
    body = json.dumps({"model": "lm", "messages": TALK, "stream": True, "logprobs": True, "top_logprobs": 5}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, head.encode() + body)
    assert (await loop.sock_recv(client, 1)) == b"H"
    before = -1
    while source.pulled != before:
        before = source.pulled
        await asyncio.sleep(0.2)
    # 2,000 pieces of some 25 kB are to be had; what fits the buffers of both sides was asked for, and no more.
    assert 1 <= source.pulled < 400
    for _ in range(3):
        assert await loop.sock_recv(client, 1)
    assert source.open_calls == 1
    client.close()
    async with asyncio.timeout(5):
        while source.open_calls:
            await asyncio.sleep(0.01)
