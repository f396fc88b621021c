"""What is sent and what must come back: the texts, the request bytes of each API shape, the check of a reply.

Requests are whole byte strings made before the clock starts. Nothing here sends anything.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["openai", "classify", "tei"]
KINDS: tuple[Kind, ...] = ("openai", "classify", "tei")


def read_texts(path: Path) -> list[str]:
    """The `text` field of every line of a JSONL file, gzipped or not."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line)["text"] for line in content.splitlines()]


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """The same order for every system that is given the same seed."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    return order


def payload(kind: Kind, model: str, text: str) -> dict[str, Any]:
    """One text as an OpenAI embeddings request, a vLLM `/classify` request, or a TEI request."""
    match kind:
        case "openai" | "classify":
            return {"model": model, "input": text}
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


def encode_all(url: str, kind: Kind, model: str, texts: Sequence[str], headers: Sequence[str] = ()) -> list[bytes]:
    return [encode_request(url, json.dumps(payload(kind, model, text)).encode(), headers) for text in texts]


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
        case "classify":
            return [float(x) for x in reply["data"][0]["probs"]]
        case "tei":
            # /embed: a list of vectors; /predict: a list of {"label", "score"}, for some clients in one more list.
            first = reply[0]
            if isinstance(first, dict):
                return [float(entry["score"]) for entry in reply]
            return [float(entry["score"] if isinstance(entry, dict) else entry) for entry in first]
