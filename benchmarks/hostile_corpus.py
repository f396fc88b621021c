"""The corpus of `benchmarks.hostile`: what each attack writes, and what a service may answer to it."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator

from benchmarks.hostile_requests import (
    ANY,
    CANARY,
    JSON,
    REFUSED,
    Attack,
    Send,
    chunk,
    json_body,
    key_header,
    once,
    request,
    whole,
)


def corpus(key: str | None = None) -> list[Attack]:
    """All of them, for the families of the tests' service; `key` where it asks for one."""
    return [*_http(key), *_headers(key), *_bodies(key), *_json_attacks(key), *_models(key), *_slow(key)]


def _http(key: str | None) -> list[Attack]:
    body = json_body(model="sections", input="fox")
    own = JSON + key_header(key)
    chunked = "transfer-encoding: chunked\r\n"
    inner = request(json_body(model="sections", input=CANARY.decode()), path="/nope")
    good = request(body, headers=own)
    kept = good.replace(b"connection: close\r\n", b"")
    return [
        # Whoever decides by one and forwards by the other lets a second request through: here it would be a 404.
        whole(
            "smuggling: length and chunks",
            request(chunk(body) + b"0\r\n\r\n", headers=own + chunked, length="content-length: 4\r\n"),
            ANY,
        ),
        whole(
            "smuggling: chunks end, a request follows",
            request(b"0\r\n\r\n" + inner, headers=own + chunked, length=f"content-length: {5 + len(inner)}\r\n"),
            REFUSED | {404},
        ),
        whole(
            "smuggling: two lengths",
            request(body, headers=own, length=f"content-length: {len(body)}\r\ncontent-length: 0\r\n"),
        ),
        whole("smuggling: a list of lengths", request(body, headers=own, length=f"content-length: {len(body)}, 0\r\n")),
        whole(
            "smuggling: an obscured encoding",
            request(body, headers=own + "transfer-encoding: xchunked\r\n"),
            REFUSED | {200, 422},
        ),
        whole("smuggling: a space before the colon", request(body, headers=own + "transfer-encoding : chunked\r\n")),
        whole(
            "smuggling: two encodings",
            request(chunk(body) + b"0\r\n\r\n", headers=own + chunked + "transfer-encoding: identity\r\n", length=""),
            REFUSED | {200},
        ),
        whole("a negative length", request(body, headers=own, length="content-length: -1\r\n")),
        whole("a length that is no number", request(body, headers=own, length="content-length: many\r\n")),
        whole("a length in hexadecimal", request(body, headers=own, length="content-length: 0x10\r\n")),
        whole("a length of 10^30", request(body, headers=own, length=f"content-length: {10**30}\r\n")),
        whole(
            "a length of 10^18", request(body, headers=own, length=f"content-length: {10**18}\r\n"), frozenset({413})
        ),
        whole("HTTP/1.0", request(body, headers=own, line="POST /classify HTTP/1.0"), frozenset({200})),
        whole("HTTP/0.9", b"GET /\r\n\r\n"),
        # HAProxy takes it up, and answers in frames.
        whole("HTTP/2 without asking", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frozenset()),
        whole("HTTP/9.9", request(body, headers=own, line="POST /classify HTTP/9.9"), REFUSED | {200, 505}),
        whole("TLS to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
        whole("noise", bytes(range(256)) * 8),
        whole("only line ends", b"\r\n" * 5000, REFUSED | {408}),
        whole("a line without an end", b"GET /" + b"a" * 100_000, REFUSED | {414}),
        whole(
            "an absolute address",
            request(b"", line="GET http://other.example/health HTTP/1.1", headers=key_header(key)),
            REFUSED | {200, 404},
        ),
        whole(
            "a tunnel",
            request(b"", line="CONNECT 127.0.0.1:22 HTTP/1.1", headers=key_header(key)),
            REFUSED | {404, 405},
        ),
        whole(
            "TRACE",
            request(b"", line="TRACE / HTTP/1.1", headers=f"x-echo: {CANARY.decode()}\r\n" + key_header(key)),
            frozenset({405, 400}),
        ),
        whole(
            "an unknown method",
            request(b"", line="BREW /classify HTTP/1.1", headers=key_header(key)),
            frozenset({405, 400, 404}),
        ),
        whole("pipelined", kept * 3 + good, frozenset({200})),
        whole("pipelined, one of them bad", kept + b"nonsense\r\n\r\n" + good, frozenset({200, 400})),
        whole(
            "an upgrade",
            request(
                b"",
                line="GET /health HTTP/1.1",
                headers="upgrade: websocket\r\nsec-websocket-key: eA==\r\nsec-websocket-version: 13\r\n"
                + key_header(key),
            ),
            frozenset({200, 400, 403, 426}),
        ),
    ]


def _headers(key: str | None) -> list[Attack]:
    body, own = json_body(model="sections", input="fox"), JSON + key_header(key)

    def with_header(header: str) -> bytes:
        return request(body, headers=own + header)

    injected = b"x-injected: 1"
    return [
        whole("a header of 1 MB", with_header("x-a: " + "a" * 1_000_000 + "\r\n"), REFUSED | {431}),
        whole("a name of 100 kB", with_header("a" * 100_000 + ": a\r\n"), REFUSED | {431}),
        whole("10,000 headers", with_header("".join(f"x-{n}: {n}\r\n" for n in range(10_000))), REFUSED | {431}),
        whole("300 headers", with_header("".join(f"x-{n}: {n}\r\n" for n in range(300))), REFUSED | {200, 431}),
        whole("NUL in a header", with_header("x-a: a\x00b\r\n")),
        whole("NUL in a name", with_header("x-\x00a: b\r\n")),
        whole("bytes above 127", with_header("x-a: \xff\xfe\xc3\x28\r\n"), REFUSED | {200}),
        whole(
            "a request id that is no UTF-8", with_header("x-request-id: \xff\xfe\r\n"), REFUSED | {200}, (b"\xff\xfe",)
        ),
        whole(
            "a request id with a line end",
            with_header("x-request-id: a\rx-injected: 1\r\n"),
            REFUSED | {200},
            (injected,),
        ),
        whole(
            "a request id folded", with_header("x-request-id: a\r\n x-injected: 1\r\n"), REFUSED | {200}, (injected,)
        ),
        whole(
            "a request id of 8 kB", with_header("x-request-id: " + "r" * 8000 + "\r\n"), REFUSED | {200}, (b"r" * 200,)
        ),
        whole(
            "a request id with markup",
            with_header("x-request-id: <script>alert(1)</script>\r\n"),
            frozenset({200}),
            (b"<script",),
        ),
        whole(
            "a path with an escaped line end",
            request(b"", line="GET /nope%0d%0ax-injected:%201 HTTP/1.1", headers=key_header(key)),
            REFUSED | {404},
            (b"\nx-injected",),
        ),
        whole("a time that is no UTF-8", with_header("x-request-timeout-seconds: \xff\r\n")),
        whole("a time of NaN", with_header("x-request-timeout-seconds: nan\r\n"), REFUSED | {408}),
        whole("a time below 0", with_header("x-request-timeout-seconds: -5\r\n")),
        whole("a time of 10^400", with_header("x-request-timeout-seconds: 1e400\r\n")),
        whole("a class that is no UTF-8", with_header("x-max-disagreement: \xff\r\n"), REFUSED),
        whole("a session id that is no UTF-8", with_header("x-session-id: \xff\r\n"), frozenset({200})),
        whole(
            "a model id for Ray that is no UTF-8", with_header("serve_multiplexed_model_id: \xff\r\n"), frozenset({200})
        ),
        whole("the proxy's own header", with_header("x-fettle-proxy: guessed\r\n"), frozenset({200})),
        whole(
            "a trace that is none",
            with_header("traceparent: 00-zz-\xff-01\r\ntracestate: \xff=,=\r\n"),
            frozenset({200, 400}),
        ),
        whole("a forged origin", with_header("x-forwarded-for: 127.0.0.1\r\nhost: 127.0.0.1:22\r\n"), REFUSED | {200}),
        whole("two keys", with_header("authorization: Bearer one\r\nauthorization: Bearer two\r\n"), ANY),
        whole(
            "a key that is no UTF-8",
            request(body, headers=JSON + "authorization: Bearer \xff\xfe\r\n"),
            frozenset({200, 401}),
        ),
        whole(
            "a key of 8 kB",
            request(body, headers=JSON + "authorization: Bearer " + "k" * 8000 + "\r\n"),
            frozenset({200, 401}),
            (b"k" * 200,),
        ),
        whole(
            "100 kB of address",
            request(b"", line="GET /" + "a" * 100_000 + " HTTP/1.1", headers=key_header(key)),
            REFUSED | {414},
        ),
        whole(
            "a path upwards",
            request(b"", line="GET /../../../etc/passwd HTTP/1.1", headers=key_header(key)),
            REFUSED | {404},
            (b"root:",),
        ),
        whole(
            "a path upwards, escaped",
            request(b"", line="GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", headers=key_header(key)),
            REFUSED | {404},
            (b"root:",),
        ),
        whole(
            "a path with NUL", request(b"", line="GET /health%00 HTTP/1.1", headers=key_header(key)), REFUSED | {404}
        ),
        whole("a path with a raw NUL", request(b"", line="GET /hea\x00lth HTTP/1.1", headers=key_header(key))),
    ]


def _bodies(key: str | None) -> list[Attack]:
    own = JSON + key_header(key)
    bomb = gzip.compress(bytes(50_000_000), mtime=0)
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
        whole("50 MB in 50 kB of gzip", request(bomb, headers=own + "content-encoding: gzip\r\n"), refused),
        whole("deflate", request(zlib.compress(b"{}"), headers=own + "content-encoding: deflate\r\n"), refused),
        whole("zstd that is none", request(b"{}", headers=own + "content-encoding: zstd\r\n"), refused),
        whole("gzip without saying so", request(bomb, headers=own)),
        Attack("3 MB at once", once(request(json_body(model="sections", input="a" * 3_000_000), headers=own)), large),
        Attack("chunks without an end", endless(opened, chunk(b"a" * 65_536)), large, closes=True),
        Attack("chunks of one byte without an end", endless(opened, chunk(b" ") * 4000), large, closes=True),
        Attack(
            "chunks without an end to no path",
            endless(elsewhere, chunk(b"a" * 65_536)),
            frozenset({401, 404}),
            closes=True,
        ),
        Attack(
            "chunks without an end with a wrong key",
            endless(nobody, chunk(b"a" * 65_536)),
            frozenset({401, 413}),
            closes=True,
        ),
        whole("a chunk of 2^64", request(b"ffffffffffffffffff\r\na", headers=chunked, length="")),
        whole("a chunk of no size", request(b"zz\r\na\r\n", headers=chunked, length="")),
        whole(
            "an extension of 100 kB",
            request(b"1;" + b"e" * 100_000 + b"\r\na\r\n0\r\n\r\n", headers=chunked, length=""),
            REFUSED | {408, 413},
        ),
        whole(
            "trailers",
            request(
                chunk(json_body(model="sections", input="fox")) + b"0\r\nauthorization: Bearer x\r\n\r\n",
                headers=chunked,
                length="",
            ),
            REFUSED | {200},
        ),
        whole("no body at all", request(b"", headers=own)),
        whole("another type", request(b"<a/>", headers="content-type: application/xml\r\n" + key_header(key)), REFUSED),
        whole(
            "a form",
            request(b"a=1", headers="content-type: multipart/form-data; boundary=\r\n" + key_header(key)),
            REFUSED,
        ),
    ]


def _json_attacks(key: str | None) -> list[Attack]:
    own = JSON + key_header(key)
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
            once(request(body if isinstance(body, bytes) else body.encode(), headers=own)),
            statuses,
            mutable=len(body) < 20_000,
        )
        for name, (body, statuses) in bodies.items()
    ]


def _models(key: str | None) -> list[Attack]:
    own = JSON + key_header(key)
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
            once(request(json_body(model=model, input="fox"), headers=own)),
            REFUSED | {404},
            never,
            mutable=len(model) < 1000,
        )
        for name, model in names.items()
    ]


def _slow(key: str | None) -> list[Attack]:
    own = JSON + key_header(key)
    body = json_body(model="sections", input="fox")

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
        Attack("slow: the body never comes", once(started), ended, slow=True),
        Attack("slow: a body byte by byte", drip(started, b" ", 2.0), ended | {200}, closes=True, slow=True),
        Attack("slow: chunks byte by byte", drip(chunked, chunk(b" "), 1.0), ended, closes=True, slow=True),
    ]
