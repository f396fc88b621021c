"""The file of API keys: who may ask, how much, and until when. Keys themselves are not in it, only their hashes.

A key is 256 random bits, so nobody finds it by trying, however fast the hash: SHA-256 with a salt does, and a slow one,
which is for passwords that people make up, would only cost the router time for each request. `fettle keys` writes the
file; a running service reads it again when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from fettle.errors import KeyFileError
from fettle.family import describe_validation
from fettle.key_terms import KeyTerms
from fettle.schema import Sha256, Strict
from fettle.store import locked, write_atomic

PREFIX = "fettle"
ID_BYTES, SECRET_BYTES, SALT_BYTES = 6, 32, 16
# What an unknown id is compared with, so that it takes as long as a known one.
NOBODY = (bytes(SALT_BYTES), "0" * 64)


class Quotas(Strict):
    """Of all requests with the key, by UTC days and months. None: no limit."""

    requests_per_day: int | None = Field(default=None, ge=1)
    requests_per_month: int | None = Field(default=None, ge=1)
    tokens_per_day: int | None = Field(default=None, ge=1)
    tokens_per_month: int | None = Field(default=None, ge=1)


class KeyRecord(KeyTerms):
    """One key. `id` is a part of the key that is no secret, by which its hash is found."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    salt: str = Field(pattern=r"^[0-9a-f]{32}$", repr=False)
    sha256: Sha256 = Field(repr=False)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    quotas: Quotas = Quotas()


class KeyFile(Strict):
    schema_version: Literal[1] = 1
    keys: list[KeyRecord] = []

    @model_validator(mode="after")
    def keys_differ(self) -> KeyFile:
        for field in ("id", "name"):
            seen = [getattr(key, field) for key in self.keys]
            if len(set(seen)) < len(seen):
                raise ValueError(f"two keys have the same {field}; give each its own")
        return self


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time that it is seen."""

    key: str
    record: KeyRecord


def create(terms: KeyTerms, quotas: Quotas, expires: datetime | None, now: datetime) -> NewKey:
    """A new key for somebody."""
    id, salt = secrets.token_hex(ID_BYTES), secrets.token_bytes(SALT_BYTES)
    key = f"{PREFIX}-{id}-{secrets.token_urlsafe(SECRET_BYTES)}"
    record = KeyRecord(
        **terms.model_dump(),
        id=id,
        salt=salt.hex(),
        sha256=digest(salt, key.encode()),
        created=now,
        expires=expires,
        quotas=quotas,
    )
    return NewKey(key, record)


def digest(salt: bytes, key: bytes) -> str:
    return hashlib.sha256(salt + key).hexdigest()


def find(records: Mapping[str, KeyRecord], offered: bytes) -> KeyRecord | None:
    """Whose key it is, by `id`; whether it may be used is not looked at. As fast for a wrong one as for a right one."""
    prefix, _, rest = offered.partition(b"-")
    id = rest.partition(b"-")[0].decode("latin-1")
    record = records.get(id) if prefix == PREFIX.encode() else None
    salt, expected = NOBODY if record is None else (bytes.fromhex(record.salt), record.sha256)
    right = hmac.compare_digest(digest(salt, offered), expected)
    return record if right else None


def read(path: Path) -> KeyFile:
    """Raises KeyFileError: it is not there, or not what it should be. The message names the field, and no hash."""
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; make it with `fettle keys create`") from None
    except ValidationError as error:
        raise KeyFileError(f"{path}: {describe_validation(error)}") from None


@contextmanager
def changing(path: Path) -> Iterator[Callable[[list[KeyRecord]], None]]:
    """One writer at a time; yields what replaces the keys, at once and whole. Only the owner can read the file.

    Raises:
        BusyError: another command is writing it.
    """
    path = path.absolute()
    with locked(path.parent):

        def write(keys: list[KeyRecord]) -> None:
            content = json.dumps(KeyFile(keys=keys).model_dump(mode="json"), indent=1) + "\n"
            write_atomic(path, content.encode(), mode=0o600)

        yield write


def state(record: KeyRecord, now: datetime) -> Literal["active", "revoked", "expired"]:
    if record.revoked is not None:
        return "revoked"
    return "expired" if record.expires is not None and now >= record.expires else "active"


def now_utc() -> datetime:
    return datetime.now(UTC)
