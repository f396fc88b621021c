"""Clients that ask for long streams and take a byte a second of them, for `benchmarks.hostile` and the tests.

What counts is what they cost others: slots at the replicas, memory of the router, and connections that the service
keeps for them. The kernel may take a whole reply into its buffers; where it does not, the router gives such a client up
(`deployments.streams.STALLED_S`), which the unit tests show.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from types import TracebackType

import httpx
import psutil

from benchmarks.hostile_requests import JSON, request

EVERY_S = 1.0
# Several texts, with the likeliest tokens beside each.
WISH = {"max_tokens": 400, "n": 8, "logprobs": 5, "temperature": 1.0, "ignore_eos": True, "stream": True}


class SlowReaders:
    """So many of them while the block runs.

    `read`: what each has got; `most_slots`: slots that were taken at once; `wrong`: why `/info` failed.
    """

    def __init__(self, port: int, count: int, model: str, key: str | None = None) -> None:
        self.port = port
        self.read = [bytearray() for _ in range(count)]
        self.most_slots = 0
        self.wrong: list[str] = []
        self._key = key
        self._model = model
        self._sockets: list[socket.socket] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> SlowReaders:
        headers = JSON + ("" if self._key is None else f"authorization: Bearer {self._key}\r\n")
        for number in range(len(self.read)):
            body = json.dumps({"model": self._model, "prompt": f"slow {number}", **WISH}).encode()
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", self.port))
            reader.sendall(request(body, path="/v1/completions", headers=headers))
            reader.setblocking(False)
            self._sockets.append(reader)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for reader in self._sockets:
            reader.close()

    @property
    def statuses(self) -> Counter[str]:
        """Of those that have read so far."""
        return Counter(read[9:12].decode() for read in self.read if len(read) >= 12)

    def held(self) -> int:
        """Connections to these clients that some process of the service still has open. Takes root."""
        ours = {reader.getsockname()[1] for reader in self._sockets}
        return sum(
            each.pid is not None and each.laddr.port == self.port and bool(each.raddr) and each.raddr.port in ours
            for each in psutil.net_connections("tcp")
        )

    def _read(self) -> None:
        while not self._over.wait(EVERY_S):
            self._look()
            for number, reader in enumerate(self._sockets):
                try:
                    self.read[number] += reader.recv(1)
                except (BlockingIOError, ConnectionResetError):
                    # Nothing has come yet, or the service has given this one up.
                    continue

    def _look(self) -> None:
        try:
            self.most_slots = max(self.most_slots, slots_taken(self.port, self._key))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.wrong.append(f"/info beside the slow readers: {error!r}")


def slots_taken(port: int, key: str | None = None) -> int:
    """Texts that are at replicas now, by what the router says."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    families = httpx.get(f"http://127.0.0.1:{port}/info", headers=headers, timeout=30).json()["families"]
    return int(sum(variant["running"] for family in families for variant in family["variants"]))


def until_free(port: int, within_s: float, key: str | None = None) -> float | None:
    """Seconds until no slot was taken; None if that took longer than `within_s`."""
    started = time.monotonic()
    while slots_taken(port, key):
        if time.monotonic() - started > within_s:
            return None
        time.sleep(0.5)
    return time.monotonic() - started
