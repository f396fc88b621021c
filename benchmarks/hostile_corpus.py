"""The corpus of `benchmarks.hostile`: what each attack writes, and what a service may answer to it."""

from __future__ import annotations

import gzip
import json
import time
import zlib
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
    return _once(request(_json(model="sections", input="fox"), headers=JSON + _key(key)))


def corpus(key: str | None = None) -> list[Attack]:
    """All of them, for the families of the tests' service; `key` where it asks for one."""
    return [*_http(key), *_headers(key), *_bodies(key), *_json_attacks(key), *_models(key), *_slow(key)]


def _once(data: bytes) -> Send:
    return lambda _: iter([data])


def _one(name: str, data: bytes, statuses: frozenset[int] = REFUSED, never: tuple[bytes, ...] = ()) -> Attack:
    return Attack(name, _once(data), statuses, never, mutable=True)


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def _key(key: str | None) -> str:
    return "" if key is None else f"authorization: Bearer {key}\r\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _http(key: str | None) -> list[Attack]:
    body = _json(model="sections", input="fox")
    own = JSON + _key(key)
    chunked = "transfer-encoding: chunked\r\n"
    inner = request(_json(model="sections", input=CANARY.decode()), path="/nope")
    good = request(body, headers=own)
    kept = good.replace(b"connection: close\r\n", b"")
    return [
        # Whoever decides by one and forwards by the other lets a second request through: here it would be a 404.
        _one(
            "smuggling: length and chunks",
            request(_chunk(body) + b"0\r\n\r\n", headers=own + chunked, length="content-length: 4\r\n"),
            ANY,
        ),
        _one(
            "smuggling: chunks end, a request follows",
            request(b"0\r\n\r\n" + inner, headers=own + chunked, length=f"content-length: {5 + len(inner)}\r\n"),
            REFUSED | {404},
        ),
        _one(
            "smuggling: two lengths",
            request(body, headers=own, length=f"content-length: {len(body)}\r\ncontent-length: 0\r\n"),
        ),
        _one("smuggling: a list of lengths", request(body, headers=own, length=f"content-length: {len(body)}, 0\r\n")),
        _one(
            "smuggling: an obscured encoding",
            request(body, headers=own + "transfer-encoding: xchunked\r\n"),
            REFUSED | {200, 422},
        ),
        _one("smuggling: a space before the colon", request(body, headers=own + "transfer-encoding : chunked\r\n")),
        _one(
            "smuggling: two encodings",
            request(_chunk(body) + b"0\r\n\r\n", headers=own + chunked + "transfer-encoding: identity\r\n", length=""),
            REFUSED | {200},
        ),
        _one("a negative length", request(body, headers=own, length="content-length: -1\r\n")),
        _one("a length that is no number", request(body, headers=own, length="content-length: many\r\n")),
        _one("a length in hexadecimal", request(body, headers=own, length="content-length: 0x10\r\n")),
        _one("a length of 10^30", request(body, headers=own, length=f"content-length: {10**30}\r\n")),
        _one("a length of 10^18", request(body, headers=own, length=f"content-length: {10**18}\r\n"), frozenset({413})),
        _one("HTTP/1.0", request(body, headers=own, line="POST /classify HTTP/1.0"), frozenset({200})),
        _one("HTTP/0.9", b"GET /\r\n\r\n"),
        # HAProxy takes it up, and answers in frames.
        _one("HTTP/2 without asking", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frozenset()),
        _one("HTTP/9.9", request(body, headers=own, line="POST /classify HTTP/9.9"), REFUSED | {200, 505}),
        _one("TLS to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
        _one("noise", bytes(range(256)) * 8),
        _one("only line ends", b"\r\n" * 5000, REFUSED | {408}),
        _one("a line without an end", b"GET /" + b"a" * 100_000, REFUSED | {414}),
        _one(
            "an absolute address",
            request(b"", line="GET http://other.example/health HTTP/1.1", headers=_key(key)),
            REFUSED | {200, 404},
        ),
        _one("a tunnel", request(b"", line="CONNECT 127.0.0.1:22 HTTP/1.1", headers=_key(key)), REFUSED | {404, 405}),
        _one(
            "TRACE",
            request(b"", line="TRACE / HTTP/1.1", headers=f"x-echo: {CANARY.decode()}\r\n" + _key(key)),
            frozenset({405, 400}),
        ),
        _one(
            "an unknown method",
            request(b"", line="BREW /classify HTTP/1.1", headers=_key(key)),
            frozenset({405, 400, 404}),
        ),
        _one("pipelined", kept * 3 + good, frozenset({200})),
        _one("pipelined, one of them bad", kept + b"nonsense\r\n\r\n" + good, frozenset({200, 400})),
        _one(
            "an upgrade",
            request(
                b"",
                line="GET /health HTTP/1.1",
                headers="upgrade: websocket\r\nsec-websocket-key: eA==\r\nsec-websocket-version: 13\r\n" + _key(key),
            ),
            frozenset({200, 400, 403, 426}),
        ),
    ]


def _headers(key: str | None) -> list[Attack]:
    body, own = _json(model="sections", input="fox"), JSON + _key(key)

    def with_header(header: str) -> bytes:
        return request(body, headers=own + header)

    injected = b"x-injected: 1"
    return [
        _one("a header of 1 MB", with_header("x-a: " + "a" * 1_000_000 + "\r\n"), REFUSED | {431}),
        _one("a name of 100 kB", with_header("a" * 100_000 + ": a\r\n"), REFUSED | {431}),
        _one("10,000 headers", with_header("".join(f"x-{n}: {n}\r\n" for n in range(10_000))), REFUSED | {431}),
        _one("300 headers", with_header("".join(f"x-{n}: {n}\r\n" for n in range(300))), REFUSED | {200, 431}),
        _one("NUL in a header", with_header("x-a: a\x00b\r\n")),
        _one("NUL in a name", with_header("x-\x00a: b\r\n")),
        _one("bytes above 127", with_header("x-a: \xff\xfe\xc3\x28\r\n"), REFUSED | {200}),
        _one(
            "a request id that is no UTF-8", with_header("x-request-id: \xff\xfe\r\n"), REFUSED | {200}, (b"\xff\xfe",)
        ),
        _one(
            "a request id with a line end",
            with_header("x-request-id: a\rx-injected: 1\r\n"),
            REFUSED | {200},
            (injected,),
        ),
        _one("a request id folded", with_header("x-request-id: a\r\n x-injected: 1\r\n"), REFUSED | {200}, (injected,)),
        _one(
            "a request id of 8 kB", with_header("x-request-id: " + "r" * 8000 + "\r\n"), REFUSED | {200}, (b"r" * 200,)
        ),
        _one(
            "a request id with markup",
            with_header("x-request-id: <script>alert(1)</script>\r\n"),
            frozenset({200}),
            (b"<script",),
        ),
        _one(
            "a path with an escaped line end",
            request(b"", line="GET /nope%0d%0ax-injected:%201 HTTP/1.1", headers=_key(key)),
            REFUSED | {404},
            (b"\nx-injected",),
        ),
        _one("a time that is no UTF-8", with_header("x-request-timeout-seconds: \xff\r\n")),
        _one("a time of NaN", with_header("x-request-timeout-seconds: nan\r\n"), REFUSED | {408}),
        _one("a time below 0", with_header("x-request-timeout-seconds: -5\r\n")),
        _one("a time of 10^400", with_header("x-request-timeout-seconds: 1e400\r\n")),
        _one("a class that is no UTF-8", with_header("x-max-disagreement: \xff\r\n"), REFUSED),
        _one("a session id that is no UTF-8", with_header("x-session-id: \xff\r\n"), frozenset({200})),
        _one(
            "a model id for Ray that is no UTF-8", with_header("serve_multiplexed_model_id: \xff\r\n"), frozenset({200})
        ),
        _one("the proxy's own header", with_header("x-fettle-proxy: guessed\r\n"), frozenset({200})),
        _one(
            "a trace that is none",
            with_header("traceparent: 00-zz-\xff-01\r\ntracestate: \xff=,=\r\n"),
            frozenset({200, 400}),
        ),
        _one("a forged origin", with_header("x-forwarded-for: 127.0.0.1\r\nhost: 127.0.0.1:22\r\n"), REFUSED | {200}),
        _one("two keys", with_header("authorization: Bearer one\r\nauthorization: Bearer two\r\n"), ANY),
        _one(
            "a key that is no UTF-8",
            request(body, headers=JSON + "authorization: Bearer \xff\xfe\r\n"),
            frozenset({200, 401}),
        ),
        _one(
            "a key of 8 kB",
            request(body, headers=JSON + "authorization: Bearer " + "k" * 8000 + "\r\n"),
            frozenset({200, 401}),
            (b"k" * 200,),
        ),
        _one(
            "100 kB of address",
            request(b"", line="GET /" + "a" * 100_000 + " HTTP/1.1", headers=_key(key)),
            REFUSED | {414},
        ),
        _one(
            "a path upwards",
            request(b"", line="GET /../../../etc/passwd HTTP/1.1", headers=_key(key)),
            REFUSED | {404},
            (b"root:",),
        ),
        _one(
            "a path upwards, escaped",
            request(b"", line="GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", headers=_key(key)),
            REFUSED | {404},
            (b"root:",),
        ),
        _one("a path with NUL", request(b"", line="GET /health%00 HTTP/1.1", headers=_key(key)), REFUSED | {404}),
        _one("a path with a raw NUL", request(b"", line="GET /hea\x00lth HTTP/1.1", headers=_key(key))),
    ]


def _bodies(key: str | None) -> list[Attack]:
    own = JSON + _key(key)
    bomb = gzip.compress(bytes(50_000_000))
    chunked = own + "transfer-encoding: chunked\r\n"
    large = frozenset({413})
    refused = frozenset({415})

    def endless(head: bytes, piece: bytes) -> Send:
        def send(until: float) -> Iterator[bytes]:
            yield head
            while time.monotonic() < until:
                yield piece

        return send

    opened = request(b"", headers=chunked, length="")
    elsewhere = request(b"", path="/nope", headers=chunked, length="")
    nobody = request(b"", headers=JSON + "transfer-encoding: chunked\r\nauthorization: Bearer wrong\r\n", length="")
    return [
        _one("50 MB in 50 kB of gzip", request(bomb, headers=own + "content-encoding: gzip\r\n"), refused),
        _one("deflate", request(zlib.compress(b"{}"), headers=own + "content-encoding: deflate\r\n"), refused),
        _one("zstd that is none", request(b"{}", headers=own + "content-encoding: zstd\r\n"), refused),
        _one("gzip without saying so", request(bomb, headers=own)),
        Attack("3 MB at once", _once(request(_json(model="sections", input="a" * 3_000_000), headers=own)), large),
        Attack("chunks without an end", endless(opened, _chunk(b"a" * 65_536)), large, closes=True),
        Attack("chunks of one byte without an end", endless(opened, _chunk(b" ") * 4000), large, closes=True),
        Attack(
            "chunks without an end to no path",
            endless(elsewhere, _chunk(b"a" * 65_536)),
            frozenset({401, 404}),
            closes=True,
        ),
        Attack(
            "chunks without an end with a wrong key",
            endless(nobody, _chunk(b"a" * 65_536)),
            frozenset({401, 413}),
            closes=True,
        ),
        _one("a chunk of 2^64", request(b"ffffffffffffffffff\r\na", headers=chunked, length="")),
        _one("a chunk of no size", request(b"zz\r\na\r\n", headers=chunked, length="")),
        _one(
            "an extension of 100 kB",
            request(b"1;" + b"e" * 100_000 + b"\r\na\r\n0\r\n\r\n", headers=chunked, length=""),
            REFUSED | {408, 413},
        ),
        _one(
            "trailers",
            request(
                _chunk(_json(model="sections", input="fox")) + b"0\r\nauthorization: Bearer x\r\n\r\n",
                headers=chunked,
                length="",
            ),
            REFUSED | {200},
        ),
        _one("no body at all", request(b"", headers=own)),
        _one("another type", request(b"<a/>", headers="content-type: application/xml\r\n" + _key(key)), REFUSED),
        _one(
            "a form", request(b"a=1", headers="content-type: multipart/form-data; boundary=\r\n" + _key(key)), REFUSED
        ),
    ]


def _json_attacks(key: str | None) -> list[Attack]:
    own = JSON + _key(key)
    entity = '{"model":"sections","input":'
    bodies: dict[str, tuple[str | bytes, frozenset[int]]] = {
        "1,000,000 open brackets": ("[" * 1_000_000, REFUSED),
        "300,000 nested objects": ('{"a":' * 300_000, REFUSED),
        "nested in the input": (entity + "[" * 100_000 + "]" * 100_000 + "}", REFUSED),
        "nested in a field that nobody knows": ('{"x":' + "[" * 500 + "]" * 500 + "}", REFUSED),
        "a number of 100,000 digits": (entity + "1" * 100_000 + "}", REFUSED),
        "tokens of 100,000 digits": (entity + "[" + "9" * 100_000 + "]}", REFUSED),
        "1e999999999": (entity + "[1e999999999]}", REFUSED),
        "NaN": (entity + "[NaN]}", REFUSED),
        "Infinity": ('{"model":"sections","input":"fox","max_disagreement":Infinity}', REFUSED),
        "-0.0 and a class": ('{"model":"sections","input":"fox","max_disagreement":-0.0}', REFUSED | {200}),
        "invalid UTF-8": (b'{"model":"sections","input":"\xff\xfe\xc0\xaf"}', REFUSED),
        "an overlong NUL": (b'{"model":"sections","input":"\xc0\x80"}', REFUSED),
        "half a surrogate": (entity + '"\\ud800"}', REFUSED | {200}),
        "a NUL in the input": (entity + '"a\\u0000b"}', frozenset({200})),
        "the same key twice": ('{"model":"sections","model":"emb","input":"fox"}', REFUSED | {200, 404}),
        "the prototype": ('{"model":"sections","input":"fox","__proto__":{"a":1},"constructor":{}}', REFUSED | {200}),
        "300 inputs": (entity + json.dumps(["fox"] * 300) + "}", frozenset({413})),
        "100,000 inputs": (entity + json.dumps(["a"] * 100_000) + "}", frozenset({413})),
        "a word of 1,900,000 letters": (entity + '"' + "a" * 1_900_000 + '"}', REFUSED | {200, 413, 429}),
        "tokens below 0": (entity + "[-1,-2]}", REFUSED),
        "tokens of 2^63": (entity + f"[{2**63}]}}", REFUSED),
        "a byte order mark": (b"\xef\xbb\xbf" + entity.encode() + b'"fox"}', REFUSED | {200}),
        "comments": (entity + '"fox"/* */}', REFUSED),
        "two values": (entity + '"fox"}{"model":"emb"}', REFUSED),
    }
    return [
        Attack(
            f"JSON: {name}",
            _once(request(body if isinstance(body, bytes) else body.encode(), headers=own)),
            statuses,
            mutable=len(body) < 20_000,
        )
        for name, (body, statuses) in bodies.items()
    ]


def _models(key: str | None) -> list[Attack]:
    own = JSON + _key(key)
    names = {
        "upwards": "../../../etc/passwd",
        "upwards in the variant": "sections:../../fp32",
        "absolute": "/etc/passwd",
        "a drive": "C:\\windows\\system32",
        "NUL": "sections\x00",
        "a line end": "sections\r\nx-injected: 1",
        "100,000 letters": "m" * 100_000,
        "a template": "{{7*191}}${7*191}%{7*191}",
        "a shell": "$(id);`id`|id",
        "markup": "<script>alert(1)</script>",
        "a format": "%s%n{0}{__class__}",
        "empty": "",
        "only a colon": ":",
        "an address": "http://127.0.0.1:1/x",
    }
    never = (b"root:", b"\nx-injected", b"uid=", b"1337", b"m" * 2000)
    return [
        Attack(
            f"model: {name}",
            _once(request(_json(model=model, input="fox"), headers=own)),
            REFUSED | {404},
            never,
            mutable=len(model) < 1000,
        )
        for name, model in names.items()
    ]


def _slow(key: str | None) -> list[Attack]:
    own = JSON + _key(key)
    body = _json(model="sections", input="fox")

    def drip(head: bytes, piece: bytes, every_s: float) -> Send:
        def send(until: float) -> Iterator[bytes]:
            yield head
            while time.monotonic() < until:
                time.sleep(every_s)
                yield piece

        return send

    def silent(_: float) -> Iterator[bytes]:
        yield b""

    ended = frozenset({408})
    started = request(body, headers=own).removesuffix(body)
    chunked = request(b"", headers=own + "transfer-encoding: chunked\r\n", length="")
    return [
        Attack("slow: nothing is sent", silent, ended, closes=True, slow=True),
        Attack(
            "slow: headers without an end",
            drip(b"POST /classify HTTP/1.1\r\nhost: x\r\n", b"x-a: b\r\n", 1.0),
            ended,
            closes=True,
            slow=True,
        ),
        Attack(
            "slow: a header byte by byte",
            drip(b"GET /health HTTP/1.1\r\nx-a: ", b"a", 1.0),
            ended,
            closes=True,
            slow=True,
        ),
        Attack("slow: the body never comes", _once(started), ended, slow=True),
        Attack("slow: a body byte by byte", drip(started, b" ", 2.0), ended | {200}, closes=True, slow=True),
        Attack("slow: chunks byte by byte", drip(chunked, _chunk(b" "), 1.0), ended, closes=True, slow=True),
    ]
