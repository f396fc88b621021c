"""What is sent and what must come back: the request bytes of each API shape, and the check of a reply.

Requests are whole byte strings made before the clock starts. Nothing here sends anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from fettle.bench.arrivals import Profile
from fettle.errors import UsageError

Kind = Literal["openai", "classify", "classify-list", "tei", "completions", "chat"]
KINDS: tuple[Kind, ...] = ("openai", "classify", "classify-list", "tei", "completions", "chat")
GENERATES: tuple[Kind, ...] = ("completions", "chat")
# By the end of a path, the shape that it takes.
PATHS: dict[str, Kind] = {
    "/embeddings": "openai",
    "/classify": "classify",
    "/embed": "tei",
    "/predict": "tei",
    "/chat/completions": "chat",
    "/completions": "completions",
}
# The server says itself how many tokens a text has: an event may carry several.
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
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


def kind_of(url: str) -> Kind:
    """The shape of requests to this address.

    Raises:
        UsageError: its path is none of those that are known.
    """
    path = urlsplit(url).path.rstrip("/")
    for end, kind in PATHS.items():
        if path.endswith(end):
            return kind
    known = ", ".join(("/v1/embeddings", "/embed", "/classify", "/predict", "/v1/completions", "/v1/chat/completions"))
    raise UsageError(f"{url}: its path says not what to send; give the whole address with one of {known}, or --shape")


def mix_of(text: str) -> tuple[Flow, ...]:
    """`exact=0.2,0.01=0.8` as flows, one for each quality class; a name without a share has the share 1.

    Raises:
        UsageError: a share that is no positive number, or a class twice.
    """
    flows = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, share = part.partition("=")
        try:
            size = float(share or 1)
        except ValueError:
            size = 0.0
        if not 0 < size < math.inf:
            raise UsageError(f"--mix: {part!r} must be CLASS=SHARE with a share above 0, such as exact=0.2,0.01=0.8")
        flows.append(Flow(name, size, max_disagreement=_class(name)))
    if not flows or len({flow.tag for flow in flows}) < len(flows):
        raise UsageError(f"--mix {text!r}: name each class once, such as exact=0.2,0.01=0.8")
    return tuple(flows)


def _class(name: str) -> float | str:
    try:
        return float(name)
    except ValueError:
        return name


def payload(kind: Kind, model: str | None, text: str) -> dict[str, Any]:
    """One text as an OpenAI request, a vLLM `/classify` request (Infinity takes lists only), or TEI's."""
    named = {} if model is None else {"model": model}
    match kind:
        case "openai" | "classify":
            return {**named, "input": text}
        case "classify-list":
            return {**named, "input": [text]}
        case "tei":
            return {"inputs": text}
        case "completions":
            return {**named, "prompt": text, **STREAMED}
        case "chat":
            return {**named, "messages": [{"role": "user", "content": text}], **STREAMED}


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
    url: str,
    kind: Kind,
    model: str | None,
    texts: Sequence[str],
    flows: Sequence[Flow],
    headers: Sequence[str] = (),
    more: Sequence[Mapping[str, Any]] = (),
) -> list[list[Request]]:
    """Every text as a request of every flow: [flow][text]. `more` has fields of the body for each text."""
    extra = more or [{}] * len(texts)
    return [
        [
            Request(
                encode_request(
                    url,
                    json.dumps({**payload(kind, model, text), **extra[place], **flow.fields()}).encode(),
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
        case "completions" | "chat":
            raise ValueError(f"a {kind} reply has no numbers")
