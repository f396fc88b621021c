"""The paths that generate text: `/v1/completions` and `/v1/chat/completions`, whole or as server-sent events.

A call begins with its first piece: until then every failure has its own status, after it a stream ends with an event
that holds the error. A client that leaves, or a server that gives up on the request, closes the call at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi import Request, Response

from deployments import border, notes, text_calls, text_replies, text_schemas, text_shapes
from deployments.border import BodyReader, Route, Streamed, reply
from deployments.conversations import Conversations
from deployments.router import TOKENIZE_INLINE_CHARACTERS, Asked, Router
from deployments.streams import DONE, EventStream, connected, event
from deployments.text_shapes import ChatShape, CompletionShape, Gathered, Json, Shape
from deployments.text_source import Answering, Ids, Piece, Spent, TextCall, TextSource
from deployments.tool_calls import plan_tools
from deployments.wishes import wishes_of
from fettle.errors import FettleError, RequestError, UnavailableError
from fettle.manifest import TaskKind
from fettle.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve.fettle")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that is understood: the call, the shape of its reply, and what else the reply depends on.

    `bare`: only the prompt is told; `best`: so many of each prompt's candidates are, None for all.
    """

    call: TextCall
    shape: Shape
    usage: bool = False
    bare: bool = False
    best: int | None = None


class TextEndpoints:
    """The paths, bound to one router and to one source of texts."""

    def __init__(self, router: Router, source: TextSource, conversations: Conversations) -> None:
        self._router = router
        self._source = source
        self._conversations = conversations
        models = {
            "/v1/completions": text_schemas.CompletionRequest,
            "/v1/chat/completions": text_schemas.ChatRequest,
        }
        limit = router.limits
        self.readers: dict[str, BodyReader[Any]] = {
            path: BodyReader(model, limit, text_schemas.REMEDIES) for path, model in models.items()
        }

    @property
    def routes(self) -> list[Route]:
        return [
            ("/v1/completions", self.completions, Streamed(text_replies.CompletionReply)),
            ("/v1/chat/completions", self.chat_completions, Streamed(text_replies.ChatReply)),
        ]

    async def completions(self, request: Request) -> Response:
        """Completions as the OpenAI API documents them, with vLLM's sampling parameters."""
        body: text_schemas.CompletionRequest = await self.readers["/v1/completions"](request)
        text_calls.check_stream_options(body)
        asked = self._ask(request, body)
        texts, lists = _prompts(body.prompt)
        self._router.check_inputs(max(len(texts), len(lists)) * max(body.n or 1, body.best_of or 1))
        started = time.perf_counter()
        tokenizer = asked.family.tokenizer
        special = body.add_special_tokens is not False
        ids = await _encoded(tokenizer, texts, special=special) if texts else _checked(lists, tokenizer)
        ms = (time.perf_counter() - started) * 1000
        for place, prompt in enumerate(ids):
            if not len(prompt):
                raise RequestError(f"prompt: text {place} is empty; give at least one token", param="prompt")
        call = replace(text_calls.completion_call(f"cmpl-{uuid.uuid4().hex}", asked, body, ids), tokenize_ms=ms)
        echo = [*texts, *map(tokenizer.text, lists)] if body.echo else None
        bare = body.max_tokens == 0
        shape = CompletionShape(call, echo, logprobs=body.logprobs is not None, bare=bare)
        best = body.n or 1 if call.choices > (body.n or 1) else None
        return await self._answer(request, Exchange(call, shape, _wants_usage(body), bare, best))

    async def chat_completions(self, request: Request) -> Response:
        """Chat completions as the OpenAI API documents them; the model's own template makes the prompt."""
        body: text_schemas.ChatRequest = await self.readers["/v1/chat/completions"](request)
        text_calls.check_stream_options(body)
        asked = self._ask(request, body)
        self._router.check_inputs(body.n or 1)
        plan = plan_tools(body, self._conversations.chat(asked.family).source)
        started = time.perf_counter()
        effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
        text = await self._conversations.prompt(asked.family, body, with_tools=plan.told, settings=effort)
        [ids] = await _encoded(asked.family.tokenizer, [text], special=False)
        ms = (time.perf_counter() - started) * 1000
        if not len(ids):
            raise RequestError("messages: the chat template makes nothing of them; say something", param="messages")
        call = text_calls.chat_call(f"chatcmpl-{uuid.uuid4().hex}", asked, body, ids, plan.grammar)
        call = replace(call, tokenize_ms=ms)
        return await self._answer(request, Exchange(call, ChatShape(call, plan), _wants_usage(body)))

    def _ask(self, request: Request, body: text_schemas.GenerateRequest) -> Asked:
        client = border.client_of(request)
        return notes.remember(
            request, self._router.ask(body.model, TaskKind.GENERATE, wishes_of(request, body), client)
        )

    async def _answer(self, request: Request, exchange: Exchange) -> Response:
        return await (self._streamed if exchange.call.stream else self._whole)(request, exchange)

    async def _whole(self, request: Request, exchange: Exchange) -> Response:
        call = exchange.call
        choices: dict[int, Gathered] = {}
        answering: Answering | None = None
        spent: Spent | None = None
        async with aclosing(self._source.open(call)) as pieces, connected(request.receive):
            async for piece in pieces:
                choices.setdefault(piece.choice, Gathered(piece.choice)).add(piece)
                answering = answering or piece.answering
                spent = piece.spent or spent
        over = [choice for choice in choices.values() if choice.finish is not None]
        if answering is None or spent is None or len(over) < call.answers:
            raise _broken_off()
        told = text_shapes.served(self._router.id, call, answering, call.tokenize_ms, spent)
        content = {
            **_head(call, exchange.shape.object, spent.variants or answering.variants),
            "choices": [
                {**exchange.shape.whole(choice), "index": place} for place, choice in enumerate(_chosen(exchange, over))
            ],
            "usage": text_shapes.usage(call, spent, bare=exchange.bare),
            "fettle": told,
        }
        return reply(content, text_shapes.headers_of(told))

    async def _streamed(self, request: Request, exchange: Exchange) -> Response:
        pieces = self._source.open(exchange.call)
        try:
            async with connected(request.receive):
                first = await anext(pieces, None)
            if first is None or first.answering is None:
                raise _broken_off()
        except BaseException:  # a client that leaves among them, which cancels: its slots are free at once
            await pieces.aclose()
            raise
        told = text_shapes.served(self._router.id, exchange.call, first.answering, exchange.call.tokenize_ms)
        events = self._events(request, exchange, first, first.answering, pieces)
        return EventStream(events, text_shapes.headers_of(told), pieces)

    async def _events(
        self,
        request: Request,
        exchange: Exchange,
        first: Piece,
        answering: Answering,
        pieces: AsyncGenerator[Piece, None],
    ) -> AsyncGenerator[bytes, None]:
        """A block of events for each piece that has something to tell; the end comes with the last one."""
        chunks, piece = Chunks(exchange, answering), first
        try:
            while piece.spent is None:
                if block := chunks.block(piece):
                    yield block
                piece = await anext(pieces)
            call = exchange.call
            told = text_shapes.served(self._router.id, call, answering, call.tokenize_ms, piece.spent)
            yield chunks.end(piece, piece.spent, told) + DONE
            return
        except FettleError as error:
            failure = error
        except StopAsyncIteration:
            failure = _broken_off()
        except Exception:
            # A bug. The status has been sent, so the stream alone can say so: `border` sees no error any more.
            logger.exception("unexpected error in a stream of %s", exchange.call.asked.family.name)
            failure = FettleError("internal error; the service's log has the details")
        notes.note_error(self._router.journal, request.scope, failure)
        yield event(failure.body()) + DONE


class Chunks:
    """The chunks of one stream, as events."""

    def __init__(self, exchange: Exchange, answering: Answering) -> None:
        self._exchange = exchange
        self._head = _head(exchange.call, exchange.shape.chunk_object, answering.variants)
        if exchange.usage:
            self._head["usage"] = None
        self._left = exchange.call.answers

    def block(self, piece: Piece) -> bytes:
        """Nothing where the piece has nothing to tell yet."""
        return b"".join(map(event, self._chunks(piece)))

    def end(self, piece: Piece, spent: Spent, told: Json) -> bytes:
        """The last piece, and what is told of the whole. Raises UnavailableError if a choice has not ended."""
        chunks = self._chunks(piece)
        if self._left:
            raise _broken_off()
        if self._exchange.usage:
            used = text_shapes.usage(self._exchange.call, spent, bare=self._exchange.bare)
            chunks.append({**self._head, "choices": [], "usage": used})
        if chunks:
            chunks[-1]["fettle"] = told
        return b"".join(map(event, chunks))

    def _chunks(self, piece: Piece) -> list[Json]:
        self._left -= piece.finish is not None
        return [{**self._head, "choices": [part]} for part in self._exchange.shape.parts(piece)]


def _prompts(given: str | list[Any]) -> tuple[list[str], list[list[int]]]:
    """One of the two is empty. The schema has already made sure of the shape."""
    if isinstance(given, str):
        return [given], []
    if isinstance(given[0], int):
        return [], [given]
    return ([], given) if isinstance(given[0], list) else (given, [])


async def _encoded(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool) -> list[Ids]:
    def encode() -> list[Ids]:
        return [tokenizer.ids(text, special=special) for text in texts]

    # One large request is not to stall the rest.
    large = sum(map(len, texts)) > TOKENIZE_INLINE_CHARACTERS
    return await asyncio.to_thread(encode) if large else encode()


def _checked(lists: Sequence[list[int]], tokenizer: Tokenizer) -> list[Ids]:
    for ids in lists:
        text_calls.check_ids(ids, tokenizer.spec.vocabulary, "prompt")
    return [np.array(ids, np.int32) for ids in lists]


def _wants_usage(body: text_schemas.GenerateRequest) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _head(call: TextCall, kind: str, variants: Sequence[str]) -> Json:
    """What a reply and each of its chunks begin with."""
    return {
        "id": call.id,
        "object": kind,
        "created": int(time.time()),
        "model": text_shapes.model_name(call, variants),
        "system_fingerprint": text_shapes.fingerprint(call, variants),
    }


def _chosen(exchange: Exchange, choices: Sequence[Gathered]) -> list[Gathered]:
    """All in order; or of each prompt's candidates the best, the best of them first."""
    if exchange.best is None:
        return sorted(choices, key=lambda choice: choice.index)
    chosen = []
    for place in range(len(exchange.call.prompts)):
        own = [choice for choice in choices if choice.index // exchange.call.choices == place]
        own.sort(key=lambda choice: (-choice.mean_logprob, choice.index))
        chosen += own[: exchange.best]
    return chosen


def _broken_off() -> UnavailableError:
    return UnavailableError("the text broke off before its end; send the request again")
