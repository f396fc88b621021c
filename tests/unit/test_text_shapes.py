"""From pieces to OpenAI's shapes: whole replies and chunks tell the same, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deployments import text_shapes
from deployments.router import Wishes
from deployments.text_shapes import ChatShape, CompletionShape, Gathered, Json
from deployments.text_source import Answering, EarlyStop, Piece, Spent, TextCall, Votes
from deployments.tool_calls import ToolPlan
from fettle.generation import Finish, Sampling, Token
from fettle.manifest import TaskKind
from tests.inprocess import make_router
from tests.texts import (
    BOS,
    FIRST_BYTE,
    IM_END,
    IM_START,
    OTHER,
    OTHER_LOGPROB,
    framed,
    ids_of,
    make_text_family,
    pieces_of,
    token,
)

TEXT = "Grüße 漢字!"


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory):
    return make_router([make_text_family(tmp_path_factory.mktemp("family") / "lm")])


def call_of(router, *prompts: str, logprobs: int | None = None, explain: bool = False, **settings: object) -> TextCall:
    asked = router.ask("lm", TaskKind.GENERATE, Wishes(explain=explain))
    ids = tuple(np.array(ids_of(prompt), np.int32) for prompt in prompts or ("Once",))
    return TextCall("id", asked, ids, Sampling(logprobs=logprobs), **settings)  # type: ignore[arg-type]


def gathered(pieces: list[Piece]) -> Gathered:
    made = Gathered(pieces[0].choice)
    for piece in pieces:
        made.add(piece)
    return made


def completion(call: TextCall, echo: list[str] | None = None, *, bare: bool = False) -> CompletionShape:
    return CompletionShape(call, echo, logprobs=call.sampling.logprobs is not None, bare=bare)


def told_in(parts: list[Json], name: str) -> list[object]:
    return [item for part in parts if part["logprobs"] for item in part["logprobs"][name]]


def in_chunks(shape, pieces: list[Piece]) -> list[Json]:
    return [part for piece in pieces for part in shape.parts(piece)]


# Completions.


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_chunks_of_a_completion_add_up_to_the_whole(router, size: int):
    call = call_of(router, logprobs=1)
    pieces = pieces_of(call, 0, TEXT, size=size)
    whole = completion(call).whole(gathered(pieces))
    parts = in_chunks(completion(call), pieces)
    assert "".join(part["text"] for part in parts) == whole["text"] == TEXT
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts if part["logprobs"] for item in part["logprobs"][name]] == whole["logprobs"][
            name
        ]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert "fettle" not in parts[0] or len(parts) == 1
    assert parts[-1]["fettle"] == {"finish": "stop"}


def test_tokens_of_a_completion_are_told_with_their_places(router):
    call = call_of(router, logprobs=2)
    told = completion(call).whole(gathered(pieces_of(call, 0, "aü!")))["logprobs"]
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xbc", "!"]
    # Both bytes of a character begin where it does.
    assert told["text_offset"] == [0, 1, 1, 2]
    assert told["token_logprobs"] == [-0.25, -0.5, -0.75, -1.0]
    assert told["top_logprobs"][0] == {"a": -0.25, "~": OTHER_LOGPROB}


def test_the_token_itself_is_among_the_most_likely_even_if_it_is_not(router):
    call = call_of(router, logprobs=0)
    piece = Piece(0, "a", (Token(ids_of("a")[0], -7.0, ((OTHER, -0.1),)),), Finish.STOP)
    assert completion(call).whole(gathered([piece]))["logprobs"]["top_logprobs"] == [{"~": -0.1, "a": -7.0}]


def test_what_is_impossible_and_what_is_unknown_is_json_all_the_same(router):
    assert text_shapes.number(-math.inf) == -9999.0
    assert text_shapes.number(math.nan) is None
    assert text_shapes.number(-1.5) == -1.5


@pytest.mark.parametrize("size", [1, 100])
def test_an_echoed_prompt_stands_before_each_of_its_choices(router, size: int):
    prompts = ["Wörter", "b"]
    call = call_of(router, *prompts, choices=2, logprobs=0, prompt_logprobs=True)
    for number in range(4):
        prompt, text = prompts[number // 2], f"text {number}"
        pieces = pieces_of(call, number, text, size=size)
        whole = completion(call, prompts).whole(gathered(pieces))
        parts = in_chunks(completion(call, prompts), pieces)
        assert "".join(part["text"] for part in parts) == whole["text"] == prompt + text
        told = whole["logprobs"]
        assert len(told["tokens"]) == len((prompt + text).encode())
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert None not in told["token_logprobs"][1:]
        place = told["text_offset"][len(prompt.encode())]
        assert whole["text"][place:] == text
        assert [offset for part in parts for offset in (part["logprobs"] or {}).get("text_offset", [])] == told[
            "text_offset"
        ]


def test_a_prompt_alone_may_be_told(router):
    call = call_of(router, "ab", logprobs=0, prompt_logprobs=True, max_tokens=1)
    pieces = pieces_of(call, 0, "x", finish=Finish.LENGTH)
    whole = completion(call, ["ab"], bare=True).whole(gathered(pieces))
    assert whole["text"] == "ab"
    assert whole["logprobs"]["tokens"] == ["a", "b"]
    assert whole["finish_reason"] == "length"
    assert text_shapes.usage(call, Spent(1), bare=True)["completion_tokens"] == 0


def test_echo_shows_special_tokens_and_counts_them(router):
    call = call_of(router, logprobs=0, prompt_logprobs=True)
    call.prompts[0][0] = IM_START
    pieces = pieces_of(call, 0, "x")
    tokenizer = call.asked.family.tokenizer
    whole = completion(call, [tokenizer.text(call.prompts[0].tolist())]).whole(gathered(pieces))
    assert whole["text"] == "<|im_start|>ncex"
    assert whole["logprobs"]["text_offset"] == [0, 12, 13, 14, 15]


def test_a_token_that_was_put_before_a_text_begins_where_the_text_does(router):
    call = call_of(router, logprobs=0, prompt_logprobs=True)
    call.prompts[0][0] = BOS
    told = completion(call, ["nce"]).whole(gathered(pieces_of(call, 0, "x")))["logprobs"]
    assert told["tokens"] == ["<s>", "n", "c", "e", "x"]
    assert told["text_offset"] == [0, 0, 1, 2, 3]


def test_nothing_is_told_of_a_piece_without_text(router):
    call = call_of(router)
    assert completion(call).parts(Piece(0, "", (token(FIRST_BYTE),))) == []


def test_without_logprobs_none_are_told(router):
    call = call_of(router, logprobs=0)
    shape = CompletionShape(call, logprobs=False, bare=False)
    assert shape.whole(gathered(pieces_of(call, 0, "ab")))["logprobs"] is None


# Chats.


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_chunks_of_a_chat_add_up_to_the_whole(router, size: int):
    call = call_of(router, logprobs=1)
    pieces = pieces_of(call, 0, TEXT, size=size)
    whole = ChatShape(call, ToolPlan()).whole(gathered(pieces))
    parts = in_chunks(ChatShape(call, ToolPlan()), pieces)
    assert parts[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["delta"].get("content", "") for part in parts) == whole["message"]["content"] == TEXT
    told = [entry for part in parts for entry in (part["logprobs"] or {}).get("content", [])]
    assert told == whole["logprobs"]["content"]
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == TEXT
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert parts[-1]["delta"] == {}
    assert whole["message"]["role"] == "assistant"
    assert whole["message"]["refusal"] is None
    assert "tool_calls" not in whole["message"]


def test_tokens_of_a_chat_are_told_with_their_bytes(router):
    call = call_of(router, logprobs=1)
    [first, second] = ChatShape(call, ToolPlan()).whole(gathered(pieces_of(call, 0, "ü")))["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("bytes:\\xc3", [0xC3], -0.25)
    # As many of the most likely ones as were asked for.
    assert first["top_logprobs"] == [{"token": "bytes:\\xc3", "logprob": -0.25, "bytes": [0xC3]}]
    assert second["bytes"] == [0xBC]
    none = call_of(router, logprobs=0)
    told = ChatShape(none, ToolPlan()).whole(gathered(pieces_of(none, 0, "ü")))["logprobs"]
    assert [entry["top_logprobs"] for entry in told["content"]] == [[], []]


def test_a_chat_without_logprobs(router):
    call = call_of(router)
    parts = in_chunks(ChatShape(call, ToolPlan()), pieces_of(call, 0, TEXT, size=2))
    assert {repr(part["logprobs"]) for part in parts} == {"None"}
    # A piece that completes no character says nothing.
    assert all(part["delta"] for part in parts[:-1])


def test_an_empty_answer(router):
    call = call_of(router)
    whole = ChatShape(call, ToolPlan()).whole(gathered(pieces_of(call, 0, "")))
    assert whole["message"]["content"] == ""
    roles = in_chunks(ChatShape(call, ToolPlan()), pieces_of(call, 0, ""))
    assert [part["delta"] for part in roles] == [{"role": "assistant", "content": ""}, {}]


@pytest.mark.parametrize("finish", Finish)
def test_every_finish_has_a_word_of_openai(router, finish: Finish):
    told = text_shapes.finish_fields(Piece(0, finish=finish), call_of(router))
    assert told["finish_reason"] in ("stop", "length")
    assert told["fettle"] == {"finish": finish.value}
    assert (told["finish_reason"] == "stop") == (finish is Finish.STOP or "early" in finish or "escalated" in finish)


@pytest.mark.parametrize(("stopped_by", "told"), [("END", "END"), (7, 7), (IM_END, None), (None, None)])
def test_what_stopped_a_text_is_told_unless_it_is_the_models_own_end(router, stopped_by, told):
    call = call_of(router, stop_ids=frozenset({7}))
    assert text_shapes.finish_fields(Piece(0, finish=Finish.STOP, stopped_by=stopped_by), call)["stop_reason"] == told


# Around the choices.


def test_usage_counts_a_prompt_once(router):
    call = call_of(router, "abc", "de", choices=4)
    assert text_shapes.usage(call, Spent(20, cached_tokens=2)) == {
        "prompt_tokens": 5,
        "completion_tokens": 20,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


ANSWERING = Answering(("bf16",), "fast", 0.008, gear=1, queue_ms=1.23456)


def test_who_answered_is_told_as_elsewhere(router):
    call = call_of(router)
    told = text_shapes.served(router.id, call, ANSWERING, 0.5, Spent(3, infer_ms=9.87654))
    assert told == {
        "router": router.id,
        "family": "lm",
        "class": call.asked.quality.asked,
        "point": "fast",
        "bound": 0.008,
        "variant": "bf16",
        "gear": 1,
        "degraded": False,
        "tokenize_ms": 0.5,
        "queue_ms": 1.235,
        "infer_ms": 9.877,
    }
    headers = text_shapes.headers_of(told)
    assert headers["x-fettle-bound"] == "0.008"
    assert headers["x-fettle-gear"] == "1"
    assert "x-fettle-degraded" not in headers


def test_who_answered_in_the_end_may_be_another(router):
    told = text_shapes.served(router.id, call_of(router), ANSWERING, 0.5, Spent(3, variants=("int4", "bf16")))
    assert told["variant"] == "int4,bf16"


def test_no_promise_holds_for_a_clients_own_thresholds(router):
    call = call_of(router, early_stop=EarlyStop(end_probability=0.5))
    told = text_shapes.served(router.id, call, ANSWERING, 0.5)
    assert (told["bound"], told["early_stop"]) == ("none", "uncertified")
    assert text_shapes.headers_of(told)["x-fettle-early-stop"] == "uncertified"


def test_votes_and_explanations_are_for_the_body(router):
    spent = Spent(3, votes=(Votes(7, 5),), explained={"attempts": []})
    told = text_shapes.served(router.id, call_of(router, explain=True), ANSWERING, 0.5, spent)
    assert told["votes"] == [{"drawn": 7, "won": 5}]
    assert told["explain"] == {"attempts": []}
    assert not {"x-fettle-votes", "x-fettle-explain"} & set(text_shapes.headers_of(told))
    assert "explain" not in text_shapes.served(router.id, call_of(router), ANSWERING, 0.5, spent)


def test_the_fingerprint_is_of_who_answers(router):
    call = call_of(router)
    one, other = (text_shapes.fingerprint(call, [name]) for name in ("bf16", "int4"))
    assert one != other
    assert one == text_shapes.fingerprint(call, ["bf16"])
    assert one.startswith("fp_")
    assert text_shapes.model_name(call, ["int4"]) == "lm:int4"
    assert text_shapes.model_name(call, ["int4", "bf16"]) == "lm"


def test_the_script_of_these_tests_is_whole(router):
    call = call_of(router, logprobs=1)
    pieces = framed(pieces_of(call, 0, TEXT, size=1))
    assert len(pieces) == len(TEXT.encode())
    assert pieces[-1].spent is not None
    assert pieces[-1].spent.completion_tokens == len(pieces)
