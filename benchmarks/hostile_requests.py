"""What a hostile request is: the bytes of its pieces, and what a service may answer. `hostile_corpus` lists them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Writes pieces until its own end, or about until the given time of `time.monotonic`.
Send = Callable[[float], Iterator[bytes]]
# Sent by every attack as if it were another client's; no reply may hold it but the attack's own.
CANARY = b"canary-7d1f0c2e"
REFUSED = frozenset({400})
ANY = frozenset(range(200, 500))
JSON = "content-type: application/json\r\n"


@dataclass(frozen=True, slots=True)
class Attack:
    """`statuses`: what may come; none: whatever, or nothing. `never`: what no reply may hold. `closes`: the service
    ends the connection by itself. `mutable`: of one piece, so that it can be mutated.
    """

    name: str
    send: Send
    statuses: frozenset[int] = ANY
    never: tuple[bytes, ...] = ()
    closes: bool = False
    mutable: bool = False
    slow: bool = False


def request(
    body: bytes = b"{}",
    *,
    path: str = "/classify",
    headers: str = JSON,
    line: str | None = None,
    length: str | None = None,
) -> bytes:
    """One request that closes its connection; `line` and `length` in place of the right ones."""
    first = line or f"POST {path} HTTP/1.1"
    size = f"content-length: {len(body)}\r\n" if length is None else length
    return f"{first}\r\nhost: x\r\nconnection: close\r\n{headers}{size}\r\n".encode("latin-1") + body


def plain(key: str | None = None) -> Send:
    """An ordinary request."""
    return once(request(json_body(model="sections", input="fox"), headers=JSON + key_header(key)))


def once(data: bytes) -> Send:
    """All in one piece, at once."""
    return lambda _: iter([data])


def whole(name: str, data: bytes, statuses: frozenset[int] = REFUSED, never: tuple[bytes, ...] = ()) -> Attack:
    """An attack of one piece, which can be mutated."""
    return Attack(name, once(data), statuses, never, mutable=True)


def json_body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def key_header(key: str | None) -> str:
    return "" if key is None else f"authorization: Bearer {key}\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"
