"""A client that keeps a book: a steady load of requests, each with a text of its own, and what became of every one.

It knows what the fake engines answer, so it can tell a reply to another request from its own, and it reads on after a
reply, so it sees one that comes twice. It tries nothing again: what a broken connection swallowed is lost.

    python -m benchmarks.ledger PLAN    (JSON of `Plan`; until SIGTERM, then until all is answered or `patience_s` over)
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fettle.answers import normalized
from fettle.family import Family
from fettle.tokenizer import Tokenizer
from workers.fake import expected

ANSWERED = "answered"
STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """`entries` (host:port) take turns; `wishes` too, each merged into a request's body. `book` gets a line each."""

    family: str
    entries: tuple[str, ...]
    book: str
    wishes: tuple[dict[str, Any], ...] = ({},)
    rate: float = 20.0
    patience_s: float = 120.0

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields = json.loads(text)
        return cls(**fields | {name: tuple(fields[name]) for name in ("entries", "wishes")})


@dataclass(frozen=True, slots=True)
class Line:
    """One request. Times are of `time.time`; `end` is answered, an HTTP status, or what happened instead of a reply."""

    number: int
    entry: str
    due: float
    done: float
    end: str
    right: bool = False
    twice: bool = False

    @property
    def seconds(self) -> float:
        return self.done - self.due


class Client:
    """Keep-alive connections to each entry, one request at a time on each."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._family = Family.open(plan.family)
        self._tokenizer = Tokenizer(self._family.tokenizer_path, self._family.manifest.tokenizer)
        self._idle: dict[str, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}

    async def ask(self, number: int, due: float) -> Line:
        entry = self._plan.entries[number % len(self._plan.entries)]
        wish = self._plan.wishes[number // len(self._plan.entries) % len(self._plan.wishes)]
        words = [f"word{number // 250**place % 250}" for place in range(3)]
        body = json.dumps({"model": self._family.name, "input": " ".join(words), **wish}).encode()
        try:
            async with asyncio.timeout(self._plan.patience_s):
                status, reply, done, twice = await self._exchange(entry, body)
        except TimeoutError:
            return Line(number, entry, due, time.time(), "no reply")
        except (OSError, asyncio.IncompleteReadError) as error:
            return Line(number, entry, due, time.time(), f"broken: {type(error).__name__}")
        if status != 200:
            return Line(number, entry, due, done, str(status), twice=twice)
        return Line(number, entry, due, done, ANSWERED, self._is_right(" ".join(words), reply), twice)

    def _is_right(self, text: str, reply: bytes) -> bool:
        (row,) = self._tokenizer.encode([text])
        truth = normalized(expected(row.ids, self._family.manifest.task.width)[None])[0]
        found = np.array(json.loads(reply)["data"][0]["embedding"], np.float32)
        return bool(np.allclose(found, truth, atol=1e-4))

    async def _exchange(self, entry: str, body: bytes) -> tuple[int, bytes, float, bool]:
        """Status, body, when it was whole, and whether there was more."""
        idle = self._idle.setdefault(entry, [])
        while idle and idle[-1][0].at_eof():
            idle.pop()[1].close()
        host, _, port = entry.partition(":")
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        try:
            head = f"POST /v1/embeddings HTTP/1.1\r\nhost: {entry}\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
            reply = await reader.readexactly(int(headers["content-length"]))
        except BaseException:  # out of patience among them, which cancels: half a reply may lie in the connection
            writer.close()
            raise
        done = time.time()
        twice = await _says_more(reader)
        if twice or headers.get("connection") == "close":
            writer.close()
        else:
            idle.append((reader, writer))
        return status, reply, done, twice


def _head(text: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = text.decode().strip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _says_more(reader: asyncio.StreamReader) -> bool:
    """Whether bytes follow a whole reply."""
    try:
        async with asyncio.timeout(0.02):
            return bool(await reader.read(1))
    except TimeoutError:
        return False
    except OSError:
        return False


async def run(plan: Plan) -> None:
    """Send until SIGTERM; every request has its line when this returns."""
    client = Client(plan)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    started, number, asked = time.time(), 0, set[asyncio.Task[None]]()
    with Path(plan.book).open("w", buffering=1) as book:

        async def one(number: int, due: float) -> None:
            book.write(json.dumps(asdict(await client.ask(number, due))) + "\n")

        while not stop.is_set():
            due = started + number / plan.rate
            if (wait := due - time.time()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(one(number, due))
            asked.add(task)
            task.add_done_callback(asked.discard)
            number += 1
        await asyncio.gather(*asked)


@contextmanager
def keeping(plan: Plan) -> Iterator[None]:
    """A client in a process of its own while the block runs; the book is whole afterwards."""
    client = subprocess.Popen([sys.executable, "-m", "benchmarks.ledger", json.dumps(asdict(plan))])
    try:
        yield
    finally:
        client.terminate()
        try:
            client.wait(plan.patience_s + STOP_S)
        except subprocess.TimeoutExpired:
            client.kill()
            client.wait()
            raise


def read(book: str) -> list[Line]:
    return [Line(**json.loads(line)) for line in Path(book).read_text().splitlines()]


def account(lines: Sequence[Line], fault: float, late_s: float) -> dict[str, Any]:
    """What a fault at this time did to the requests. `hurt_s`: from the fault until the last one it hurt had ended."""
    ends = Counter(line.end for line in lines)
    after = [line for line in lines if line.done >= fault]
    late = [line for line in after if line.seconds > late_s]
    hurt = [line for line in after if line.seconds > late_s or line.end != ANSWERED]
    before = [line.seconds for line in lines if line.done < fault and line.end == ANSWERED]
    return {
        "sent": len(lines),
        "answered": ends[ANSWERED],
        "others": {end: count for end, count in ends.items() if end != ANSWERED},
        "wrong": sum(line.end == ANSWERED and not line.right for line in lines),
        "twice": sum(line.twice for line in lines),
        "late": len(late),
        "longest_s": round(max((line.seconds for line in after), default=0.0), 2),
        "hurt_s": round(max((line.done for line in hurt), default=fault) - fault, 1),
        "median_before_ms": round(1000 * float(np.median(before)), 1) if before else None,
    }


if __name__ == "__main__":
    asyncio.run(run(Plan.from_json(sys.argv[1])))
