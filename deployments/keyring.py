"""Whose key a request carries: those of the configuration, and those of the file, which is read again when it changes.

A file that cannot be read, or holds nonsense, changes nothing: the keys that were known go on, and the log says so.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from deployments.router import Client
from fettle import keys
from fettle.config import ServeConfig
from fettle.errors import AuthError, KeyFileError
from fettle.key_terms import KeyTerms
from fettle.keys import KeyRecord
from fettle.limits import KeyLimits
from fettle.usage import Meter, Usage

logger = logging.getLogger("ray.serve.fettle")

LOOK_EVERY_S = 1.0


class Keyring:
    """One router's. Lookups are on its event loop; the file is read on another thread."""

    def __init__(
        self,
        plain: Mapping[str, Client] | None = None,
        path: Path | None = None,
        *,
        routers: int = 1,
        usage: Usage | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`plain`: clients by their keys; `path`: the file of the others. Raises KeyFileError: see `keys.read`."""
        self._plain = {key.encode(): client for key, client in (plain or {}).items()}
        self._path = path
        self._routers = routers
        self._usage = usage or Usage()
        self._clock = clock
        self._records: dict[str, KeyRecord] = {}
        self._clients: dict[str, Client] = {}
        self._read: tuple[int, ...] | None = None
        self._complaint = ""
        if path is not None:
            self._take(keys.read(path), _signature(path))

    @classmethod
    def of(cls, config: ServeConfig, usage: Usage) -> Keyring:
        """As the configuration says. Raises KeyFileError."""
        plain = {each.key: Client(each.name, each.weight, limits_of(each, config.routers)) for each in config.api_keys}
        path = None if config.keys_file is None else Path(config.keys_file)
        return cls(plain, path, routers=config.routers, usage=usage)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._plain and self._path is None

    def find(self, offered: bytes) -> Client:
        """Raises AuthError: it is nobody's key, or not valid any more."""
        # Every one is compared, each in constant time, so that neither content nor position leaks.
        matches = [client for key, client in self._plain.items() if hmac.compare_digest(offered, key)]
        record = keys.find(self._records, offered) if self._records else None
        if matches:
            return matches[0]
        if record is None:
            raise AuthError("a valid API key is needed: `Authorization: Bearer KEY`")
        state = keys.state(record, datetime.fromtimestamp(self._clock(), UTC))
        if state != "active":
            raise AuthError(f"API key {record.name!r} is {state}; ask for a new one")
        return self._clients[record.id]

    async def follow(self) -> None:
        """Look at the file again and again, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the file again if it changed."""
        if self._path is None:
            return
        try:
            signature = await asyncio.to_thread(_signature, self._path)
            if signature != self._read:
                self._take(await asyncio.to_thread(keys.read, self._path), signature)
        except (KeyFileError, OSError) as error:
            # Tried again each time, and said once.
            if self._complaint != str(error):
                logger.error("the API keys stay as they were: %s", error)
            self._complaint = str(error)
        else:
            self._complaint = ""

    def _take(self, found: keys.KeyFile, signature: tuple[int, ...]) -> None:
        """What runs under a key goes on counting against its limits, old and new."""
        if clash := {client.name for client in self._plain.values()} & {record.name for record in found.keys}:
            raise KeyFileError(f"{self._path}: key {min(clash)!r} has the name of one in the configuration")
        clients = {}
        for record in found.keys:
            limits = limits_of(record, self._routers, Meter(record.name, record.quotas, self._usage, self._clock))
            known = self._clients.get(record.id)
            clients[record.id] = Client(record.name, record.weight, limits if known is None else known.limits)
            clients[record.id].limits.change(limits)
        self._records = {record.id: record for record in found.keys}
        self._clients, self._read = clients, signature


def limits_of(terms: KeyTerms, routers: int, meter: Meter | None = None) -> KeyLimits:
    """One router's share of a key's limits."""
    return KeyLimits(
        None if terms.max_concurrent is None else max(1, round(terms.max_concurrent / routers)),
        None if terms.tokens_per_second is None else terms.tokens_per_second / routers,
        meter,
    )


def _signature(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
