"""Calls from a router to a replica over a connection of their own: the frames that go both ways, and who may send them.

Ray carries a call at 2 to 3 ms of processor time and more of latency, this at a twentieth. Both sides prove that
they know the endpoint's secret, which itself never travels, before anything of theirs is read; values are pickled, so
whoever has the secret is trusted as Ray trusts its own. Knows no Ray. See `deployments.wire_server` and
`deployments.link`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import pickle
import struct
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any, cast

logger = logging.getLogger("ray.serve.fettle")

ALIVE_EVERY_S = 1.0
# For both proofs; a connection that has not proven anything by then is closed.
HANDSHAKE_S = 5.0
NONCE_BYTES = 16
# Of a frame, at most: before the proof, and after it.
STRANGER_BYTES, MOST_BYTES = 256, 1 << 28
HEADER = struct.Struct(">IBQ")
OTHERS = struct.Struct(">I")
ROUTER, REPLICA = b"router", b"replica"


class Kind(IntEnum):
    """Of a frame. `ANSWER` is the only one to its call; of a stream there are `ITEM`s and an `END`."""

    HELLO = auto()
    PROOF = auto()
    CALL = auto()
    CANCEL = auto()
    ANSWER = auto()
    ITEM = auto()
    END = auto()
    FAILED = auto()
    ALIVE = auto()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a replica listens, and what both sides must know."""

    host: str
    port: int
    secret: bytes


class Frames(asyncio.Protocol):
    """One side of a connection: bytes to frames, and frames, those of one turn of the loop together, to bytes."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._most = STRANGER_BYTES
        self._buffer = bytearray()
        self._out: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are none by name.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer, at = self._buffer, 0
        buffer += data
        while len(buffer) - at >= HEADER.size:
            size, kind, call = HEADER.unpack_from(buffer, at)
            if size > self._most:
                logger.warning("a connection was closed: a frame of %d bytes, and %d may be", size, self._most)
                self.abort()
                return
            begin = at + HEADER.size
            if len(buffer) < begin + size:
                break
            at = begin + size
            self.frame(kind, call, bytes(buffer[begin:at]))
        del buffer[:at]

    def frame(self, kind: int, call: int, payload: bytes) -> None:
        raise NotImplementedError

    def send(self, kind: Kind, call: int = 0, payload: bytes = b"") -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += (HEADER.pack(len(payload), kind, call), payload)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"".join(out))


def proof(secret: bytes, side: bytes, nonce: bytes) -> bytes:
    """That a side knows the secret: HMAC-SHA256 over who it is and what the other one made up."""
    return hmac.digest(secret, side + nonce, hashlib.sha256)


def proves(told: bytes, secret: bytes, side: bytes, nonce: bytes) -> bool:
    """Whether what was told is that side's proof."""
    return hmac.compare_digest(told, proof(secret, side, nonce))


def packed(value: object) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def unpacked(data: bytes | memoryview) -> Any:
    # Only of a side that has proven itself.
    return pickle.loads(data)  # noqa: S301
