"""The client that keeps a book: it tells right from wrong, once from twice, an error from silence."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.ledger import ANSWERED, Client, Line, Plan, account
from fettle.answers import normalized
from fettle.family import Family
from fettle.tokenizer import Tokenizer
from tests.fakes import embed_task, make_fake_family
from workers.fake import expected

pytestmark = pytest.mark.anyio

Serve = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
WIDTH = 8


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_fake_family(tmp_path / "vectors", name="vectors", task=embed_task(WIDTH))


def reply(family: Family, text: str, status: str = "200 OK") -> bytes:
    (row,) = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode([text])
    vector = normalized(expected(row.ids, WIDTH)[None])[0]
    body = json.dumps({"data": [{"embedding": vector.tolist()}]}).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"content-length" in line)
                await serve(json.loads(await reader.readexactly(length))["input"], writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    running = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with running:
        yield f"127.0.0.1:{running.sockets[0].getsockname()[1]}"


async def lines(family: Family, serve: Serve, *, asked: int = 2, patience_s: float = 20.0) -> list[Line]:
    async with server(serve) as entry:
        client = Client(Plan(str(family.directory), (entry,), "", patience_s=patience_s))
        return [await client.ask(number, time.time()) for number in range(asked)]


async def test_a_right_answer_is_one(family):
    async def serve(text: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(family, text))

    found = await lines(family, serve, asked=3)
    assert [(line.end, line.right, line.twice) for line in found] == [(ANSWERED, True, False)] * 3


async def test_the_answer_to_another_request_is_wrong(family):
    async def serve(text: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(family, text + " fox"))

    assert [(line.end, line.right) for line in await lines(family, serve)] == [(ANSWERED, False)] * 2


async def test_a_second_answer_is_seen(family):
    async def serve(text: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(family, text) * 2)

    assert [(line.right, line.twice) for line in await lines(family, serve)] == [(True, True)] * 2


async def test_an_error_and_a_broken_connection_are_told_apart(family):
    async def refuse(text: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(family, text, "503 Service Unavailable"))

    async def hang_up(text: str, writer: asyncio.StreamWriter) -> None:
        writer.close()

    assert [line.end for line in await lines(family, refuse)] == ["503", "503"]
    assert [line.end for line in await lines(family, hang_up)] == ["broken: IncompleteReadError"] * 2


async def test_silence_ends_with_the_clients_patience(family):
    async def serve(text: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0)

    (line,) = await lines(family, serve, asked=1, patience_s=0.2)
    assert line.end == "no reply"


def test_an_account_is_of_what_was_under_way_or_came_after():
    book = [
        Line(0, "a", 0.0, 3.0, ANSWERED, True),
        Line(1, "a", 9.0, 12.5, ANSWERED, True),
        Line(2, "a", 11.0, 11.2, "500"),
        Line(3, "a", 14.0, 14.1, ANSWERED, False, True),
    ]
    found = account(book, fault=10.0, late_s=1.0)
    assert (found["sent"], found["answered"], found["others"]) == (4, 3, {"500": 1})
    assert (found["late"], found["longest_s"], found["hurt_s"]) == (1, 3.5, 2.5)
    assert (found["wrong"], found["twice"]) == (1, 1)
