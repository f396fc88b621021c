"""OpenAI's own Python client, unchanged, against text generation: what it asks for, what it makes of the replies."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from deployments.text_source import Piece, TextCall
from fettle.errors import EngineError, OverloadedError
from fettle.family import Family
from tests.inprocess import make_app
from tests.texts import Script, ScriptedSource, framed, make_text_family, pieces_of, says

pytestmark = pytest.mark.anyio

TALK: list[Any] = [{"role": "user", "content": "Hi"}]
TEXT = "Grüße 漢字!"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "size",
        "description": "How large something is.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]},
    },
}


class Served:
    """A client of a service whose source does what `script` says, which a test may set anew."""

    def __init__(self, family: Family) -> None:
        self.source = ScriptedSource(says(TEXT))
        app = make_app([family], text_source=self.source)
        # What a server would answer, even to a bug.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = AsyncOpenAI(
            api_key="none",
            base_url="http://fettle/v1",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        )

    def will(self, script: Script) -> None:
        self.source.script = script

    @property
    def call(self) -> TextCall:
        return self.source.calls[-1]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_text_family(tmp_path_factory.mktemp("family") / "lm")


@pytest.fixture
async def served(family: Family) -> AsyncIterator[Served]:
    made = Served(family)
    async with made.client:
        yield made


async def test_completions(served: Served):
    reply = await served.client.completions.create(model="lm", prompt="Hi", max_tokens=20, seed=7, stop=["\n", "END"])
    assert reply.choices[0].text == TEXT
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.system_fingerprint is not None
    assert (served.call.sampling.seed, served.call.stop, served.call.max_tokens) == (7, ("\n", "END"), 20)


async def test_completions_of_several_prompts_with_logprobs_and_echo(served: Served):
    reply = await served.client.completions.create(
        model="lm", prompt=["ab", "c"], n=2, best_of=2, logprobs=2, echo=True, logit_bias={"5": -100}
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == [f"ab{TEXT}", f"ab{TEXT}", f"c{TEXT}", f"c{TEXT}"]
    told = reply.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.text_offset is not None
    assert told.top_logprobs is not None
    assert told.tokens[:2] == ["a", "b"]
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(told.top_logprobs)


async def test_completions_streamed_with_usage(served: Served):
    served.will(says(TEXT, size=2))
    stream = await served.client.completions.create(
        model="lm", prompt="Hi", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []


async def test_chat(served: Served):
    reply = await served.client.chat.completions.create(
        model="lm", messages=TALK, temperature=0, top_p=0.5, presence_penalty=1, frequency_penalty=1,
        max_completion_tokens=30, user="me", store=False, metadata={"a": "b"}, service_tier="auto",
        parallel_tool_calls=False,
    )  # fmt: skip
    assert reply.choices[0].message.content == TEXT
    assert reply.choices[0].message.role == "assistant"
    assert served.call.sampling.greedy
    assert served.call.max_tokens == 30


async def test_a_reply_can_be_sent_back_as_it_came(served: Served):
    reply = await served.client.chat.completions.create(model="lm", messages=TALK)
    messages = [*TALK, reply.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "More."}]}]
    again = await served.client.chat.completions.create(model="lm", messages=messages)
    assert again.choices[0].message.content == TEXT
    text = served.call.asked.family.tokenizer.text(served.call.prompts[0].tolist())
    assert f"assistant\n{TEXT}<|im_end|>" in text
    assert "user\nMore.<|im_end|>" in text


async def test_chat_with_several_choices_and_logprobs(served: Served):
    served.will(says("one", "two", "three"))
    reply = await served.client.chat.completions.create(
        model="lm", messages=TALK, n=3, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.message.content for choice in reply.choices] == ["one", "two", "three"]
    told = reply.choices[2].logprobs
    assert told is not None
    assert told.content is not None
    assert [entry.token for entry in told.content] == list("three")
    assert [len(entry.top_logprobs) for entry in told.content] == [2] * 5
    assert told.content[0].bytes == [ord("t")]


async def test_chat_streamed_with_usage(served: Served):
    served.will(says("one two", "three", size=2))
    stream = await served.client.chat.completions.create(
        model="lm", messages=TALK, n=2, stream=True, logprobs=True, stream_options={"include_usage": True}
    )
    texts, tokens, finishes = {0: "", 1: ""}, {0: 0, 1: 0}, {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len((choice.logprobs and choice.logprobs.content) or [])
            finishes[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == {0: "one two", 1: "three"}
    assert tokens == {0: 7, 1: 5}
    assert finishes == {0: "stop", 1: "stop"}
    assert usage is not None
    assert usage.completion_tokens == 12
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


async def test_the_clients_own_accumulation_of_a_stream(served: Served):
    served.will(says(TEXT, size=3))
    async with served.client.chat.completions.stream(model="lm", messages=TALK) as stream:
        kinds = [event.type async for event in stream]
        whole = await stream.get_final_completion()
    assert "content.delta" in kinds
    assert whole.choices[0].message.content == TEXT


class Fox(BaseModel):
    name: str
    legs: int


async def test_a_schema_for_the_answer(served: Served):
    served.will(says('{"name": "Reineke", "legs": 4}'))
    reply = await served.client.chat.completions.parse(model="lm", messages=TALK, response_format=Fox)
    assert reply.choices[0].message.parsed == Fox(name="Reineke", legs=4)
    assert served.call.grammar is not None
    assert served.call.grammar.kind == "json_schema"
    assert json.loads(str(served.call.grammar.value))["required"] == ["name", "legs"]
    await served.client.chat.completions.create(model="lm", messages=TALK, response_format={"type": "json_object"})
    assert served.call.grammar is not None
    assert served.call.grammar.kind == "json_object"


async def test_a_tool_and_its_result(served: Served):
    served.will(says('{"of": "fox"}', size=3))
    choice: Any = {"type": "function", "function": {"name": "size"}}
    reply = await served.client.chat.completions.create(model="lm", messages=TALK, tools=[TOOL], tool_choice=choice)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    [called] = message.tool_calls
    assert called.type == "function"
    assert called.function.arguments == '{"of": "fox"}'
    result: Any = {"role": "tool", "tool_call_id": called.id, "content": "40 cm"}
    # The template of these tests adds texts, so a message without one would be refused.
    told = {**message.model_dump(exclude_none=True), "content": ""}
    await served.client.chat.completions.create(model="lm", messages=[*TALK, told, result], tools=[TOOL])
    assert len(served.source.calls) == 2


async def test_a_streamed_tool_call_as_the_client_puts_it_together(served: Served):
    served.will(says('{"of": "fox"}', size=3))
    choice: Any = {"type": "function", "function": {"name": "size"}}
    async with served.client.chat.completions.stream(
        model="lm", messages=TALK, tools=[TOOL], tool_choice=choice
    ) as stream:
        whole = await stream.get_final_completion()
    [called] = whole.choices[0].message.tool_calls or []
    assert (called.function.name, called.function.arguments) == ("size", '{"of": "fox"}')


async def test_what_only_fettle_has(served: Served):
    extra = {
        "max_disagreement": "exact",
        "top_k": 5,
        "min_p": 0.1,
        "guided_choice": ["yes", "no"],
        "early_stop": {"end_probability": 0.9},
        "explain": True,
    }
    raw = await served.client.chat.completions.with_raw_response.create(
        model="lm", messages=TALK, extra_body=extra, extra_headers={"x-request-timeout-seconds": "30"}
    )
    assert raw.headers["x-fettle-variant"] == "bf16"
    reply = raw.parse()
    assert reply.model_extra is not None
    assert reply.model_extra["fettle"]["early_stop"] == "uncertified"
    assert reply.choices[0].model_extra is not None
    assert reply.choices[0].model_extra["fettle"]["finish"] == "stop"
    assert served.call.sampling.top_k == 5


async def test_models_are_listed(served: Served):
    models = [model.id async for model in await served.client.models.list()]
    assert models == ["lm", "lm:bf16", "lm:int4"]


# Errors.


async def test_refusals_are_the_errors_that_the_client_knows(served: Served):
    create: Any = served.client.chat.completions.create
    with pytest.raises(openai.NotFoundError):
        await create(model="nobody", messages=TALK)
    with pytest.raises(openai.BadRequestError) as caught:
        await create(model="lm", messages=TALK, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        await create(model="lm", messages=[{"role": "user", "content": "x" * 600}])
    assert caught.value.code == "context_length_exceeded"
    served.will(lambda call: [OverloadedError("full", retry_after_s=2)])
    with pytest.raises(openai.RateLimitError) as limit:
        await create(model="lm", messages=TALK, stream=True)
    assert limit.value.response.headers["retry-after"] == "2"
    served.will(lambda call: [EngineError("it failed")])
    with pytest.raises(openai.InternalServerError):
        await create(model="lm", messages=TALK)


async def test_an_error_within_a_stream_is_raised_where_it_came(served: Served):
    def script(call: TextCall) -> list[Piece | Exception]:
        return [*framed(pieces_of(call, 0, "abcdefgh"))[:1], EngineError("it failed")]

    served.will(script)
    stream = await served.client.chat.completions.create(model="lm", messages=TALK, stream=True)
    seen: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            seen.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="it failed"):
        await read()
    assert "".join(seen) == "abcd"
