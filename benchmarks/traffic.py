"""What is sent and what must come back: the texts, the request bytes of each API shape, the check of a reply.

Requests are whole byte strings made before the clock starts. Nothing here sends anything.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from benchmarks.arrivals import Profile

Item = TypeVar("Item")
Kind = Literal["openai", "classify", "classify-list", "tei"]
KINDS: tuple[Kind, ...] = ("openai", "classify", "classify-list", "tei")
# The first label of a reply, in the shapes of vLLM, TEI and Infinity; decoding a whole body costs ten times as much.
LABEL = re.compile(rb'"label":\s*"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Flow:
    """Requests of one sort in a stream: what they ask for, whose they are, and how many there are.

    `share` is this flow's part of the stream, relative to the others'. In an open loop a flow may have a `profile`
    of its own instead: its rate over time.
    """

    tag: str = "all"
    share: float = 1.0
    profile: Profile = ()
    max_disagreement: float | str | None = None
    priority: str | None = None
    key: str | None = None
    timeout_s: float | None = None

    def fields(self) -> dict[str, Any]:
        """What it adds to a body."""
        asked = {"max_disagreement": self.max_disagreement, "priority": self.priority}
        return {name: value for name, value in asked.items() if value is not None}

    def headers(self) -> list[str]:
        lines = [] if self.key is None else [f"Authorization: Bearer {self.key}"]
        return lines if self.timeout_s is None else [*lines, f"X-Request-Timeout-Seconds: {self.timeout_s:g}"]


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request; `flow` and `text` say which by their numbers."""

    data: bytes
    flow: int = 0
    text: int = 0


def read_texts(path: Path) -> list[str]:
    """The `text` field of every line of a JSONL file, gzipped or not."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line)["text"] for line in content.splitlines()]


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The same order for every system that is given the same seed, and for whatever goes with the texts."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def payload(kind: Kind, model: str, text: str) -> dict[str, Any]:
    """One text as an OpenAI embeddings request, a vLLM `/classify` request (Infinity takes lists only), or TEI's."""
    match kind:
        case "openai" | "classify":
            return {"model": model, "input": text}
        case "classify-list":
            return {"model": model, "input": [text]}
        case "tei":
            return {"inputs": text}


def encode_request(url: str, body: bytes, headers: Sequence[str] = ()) -> bytes:
    """A whole POST request; each header as `Name: value`."""
    parts = urlsplit(url)
    lines = [
        f"POST {parts.path or '/'} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def encode_flows(
    url: str, kind: Kind, model: str, texts: Sequence[str], flows: Sequence[Flow], headers: Sequence[str] = ()
) -> list[list[Request]]:
    """Every text as a request of every flow: [flow][text]."""
    return [
        [
            Request(
                encode_request(
                    url,
                    json.dumps(payload(kind, model, text) | flow.fields()).encode(),
                    [*headers, *flow.headers()],
                ),
                number,
                place,
            )
            for place, text in enumerate(texts)
        ]
        for number, flow in enumerate(flows)
    ]


def first_label(body: bytes) -> str:
    """The label of a classification reply, or its first one where it ranks them; empty if there is none."""
    found = LABEL.search(body)
    return "" if found is None else str(json.loads(b'"' + found[1] + b'"'))


def read_answer(kind: Kind, body: bytes) -> list[float]:
    """The numbers of a reply: the vector, or the scores.

    Raises:
        ValueError: not the documented shape, or numbers that are not finite or all zero.
    """
    try:
        numbers = _numbers(kind, json.loads(body))
    except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a {kind} reply ({error!r}): {body[:80]!r}") from None
    if not numbers or not all(map(math.isfinite, numbers)) or not any(numbers):
        raise ValueError(f"a {kind} reply without usable numbers: {body[:80]!r}")
    return numbers


def _numbers(kind: Kind, reply: Any) -> list[float]:
    match kind:
        case "openai":
            return [float(x) for x in reply["data"][0]["embedding"]]
        case "classify" | "classify-list":
            first = reply["data"][0]
            # Infinity ranks labels with their scores where vLLM has one label and all probabilities.
            return [float(x["score"]) for x in first] if isinstance(first, list) else [float(x) for x in first["probs"]]
        case "tei":
            # /embed: a list of vectors; /predict: a list of {"label", "score"}, for some clients in one more list.
            first = reply[0]
            if isinstance(first, dict):
                return [float(entry["score"]) for entry in reply]
            return [float(entry["score"] if isinstance(entry, dict) else entry) for entry in first]
