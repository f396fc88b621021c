"""Asks a running service for texts, as the demo does it: one after the other or many streams at a time, and timed."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

CHAT = "/v1/chat/completions"
EVENT, DONE = b"data: ", b"[DONE]"

Json = dict[str, Any]


class ServiceError(RuntimeError):
    """The service answered something else than a text."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """One text that came piece by piece; `first_s`: seconds from sending the request to its first visible piece."""

    text: str
    first_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Of `texts` streams, so many at a time: tokens of all a second, and the median time to a text's first piece."""

    texts: int
    tokens: int
    tokens_per_second: float
    first_ms: float


class TextClient:
    """Conversations of one message with a service that is up. `wish`: further fields of the request."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def get(self, path: str) -> Json:
        async with self._session.get(path) as response:
            found: Json = orjson.loads(await response.read())
            return found

    async def ask(self, question: str, wish: Mapping[str, object]) -> Json:
        """The whole reply. Raises ServiceError."""
        async with self._session.post(CHAT, json=body_of(question, wish)) as response:
            content = await response.read()
            if response.status != 200:
                raise ServiceError(f"{CHAT} answered {response.status}: {content.decode()}")
            reply: Json = orjson.loads(content)
            return reply

    async def ask_all(
        self, questions: Sequence[str], wish: Mapping[str, object], at_a_time: int
    ) -> tuple[list[Json], float]:
        """The replies in the order of the questions, and how many came a second."""
        replies: dict[int, Json] = {}

        async def one(index: int) -> None:
            replies[index] = await self.ask(questions[index], wish)

        seconds = await _together([one(index) for index in range(len(questions))], at_a_time)
        return [replies[index] for index in range(len(questions))], len(questions) / seconds

    async def pieces(self, question: str, wish: Mapping[str, object]) -> AsyncIterator[Json]:
        """The chunks of a streamed reply. Raises ServiceError, also for an error within the stream."""
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        async with self._session.post(CHAT, json=body_of(question, {**wish, **streamed})) as response:
            if response.status != 200:
                raise ServiceError(f"{CHAT} answered {response.status}: {(await response.read()).decode()}")
            async for line in response.content:
                content = line.removeprefix(EVENT).strip()
                if not content or content == DONE:
                    continue
                chunk: Json = orjson.loads(content)
                if "error" in chunk:
                    raise ServiceError(f"{CHAT} broke off: {chunk['error']['message']}")
                yield chunk

    async def stream(self, question: str, wish: Mapping[str, object]) -> Streamed:
        started = time.perf_counter()
        first, text, tokens = None, "", 0
        async for chunk in self.pieces(question, wish):
            piece = piece_of(chunk)
            if piece and first is None:
                first = time.perf_counter() - started
            text += piece
            tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
        return Streamed(text, time.perf_counter() - started if first is None else first, tokens)

    async def speed(self, questions: Sequence[str], wish: Mapping[str, object], at_a_time: int) -> Speed:
        found: list[Streamed] = []

        async def one(question: str) -> None:
            found.append(await self.stream(question, wish))

        seconds = await _together([one(question) for question in questions], at_a_time)
        tokens = sum(each.tokens for each in found)
        first = statistics.median(each.first_s for each in found)
        return Speed(len(found), tokens, tokens / seconds, 1000 * first)


def body_of(question: str, wish: Mapping[str, object]) -> Json:
    return {"messages": [{"role": "user", "content": question}], **wish}


def piece_of(chunk: Json) -> str:
    """The text that a chunk brings, which may be none."""
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def answer_of(reply: Json) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


def finish_of(reply: Json) -> str:
    """Why the text ended, in Fettle's own words, which say more than `finish_reason`."""
    finish: str = reply["choices"][0]["fettle"]["finish"]
    return finish


async def _together(tasks: Sequence[Any], at_a_time: int) -> float:
    """Run all, so many at a time; the seconds that it took."""
    free = asyncio.Semaphore(at_a_time)

    async def run(task: Any) -> None:
        async with free:
            await task

    started = time.perf_counter()
    await asyncio.gather(*map(run, tasks))
    return time.perf_counter() - started
