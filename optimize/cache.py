"""What a run computes on the way and keeps to go on from: the reference's answers, trained students, traces.

Everything lies below one folder of the family, each thing with a fingerprint of what it depends on. The folder may
be deleted at any time; it is no part of the family that is served.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from fettle.answers import Floats
from fettle.manifest import PassRecord, Sha256, Strict
from fettle.store import new_directory, write_atomic

FOLDER = ".work"
RECORD_FILE = "made.json"
# What reading a damaged archive from memory raises, from its directory down to a header.
DAMAGED = (BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, KeyError, RuntimeError)

Arrays = dict[str, Floats]


class Made(Strict):
    """What a finished folder says of itself: from what it was made, by which passes, and what they found."""

    fingerprint: Sha256
    passes: list[PassRecord] = []
    facts: dict[str, JsonValue] = {}


class Cache:
    def __init__(self, family: Path) -> None:
        self.directory = family / FOLDER

    def arrays(self, name: str, fingerprint: str, compute: Callable[[], Arrays]) -> Arrays:
        """Arrays that are computed once for each fingerprint."""
        path = self.directory / f"{name}.npz"
        found = _read_arrays(path, fingerprint)
        if found is None:
            found = compute()
            content = io.BytesIO()
            np.savez(content, made_from=_made_from(fingerprint, found), **found)  # type: ignore[arg-type]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.getvalue())
        return found

    def has_arrays(self, name: str, fingerprint: str) -> bool:
        return _read_arrays(self.directory / f"{name}.npz", fingerprint) is not None

    def path(self, name: str) -> Path:
        return self.directory / name

    def made(self, name: str, fingerprint: str) -> Made | None:
        """The record of a folder that is complete and made from the same things."""
        try:
            record = Made.model_validate_json((self.path(name) / RECORD_FILE).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return record if record.fingerprint == fingerprint else None

    @contextmanager
    def making(self, name: str) -> Iterator[tuple[Path, Callable[[Made], None]]]:
        """Fill a folder; it is there as soon as its record is written and the block ends."""

        def finish(record: Made) -> None:
            (new / RECORD_FILE).write_text(record.model_dump_json(indent=2))

        with new_directory(self.path(name)) as new:
            yield new, finish


def _read_arrays(path: Path, fingerprint: str) -> Arrays | None:
    """None where there is no file, where it is damaged, and where it was made from other things."""
    try:
        file = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        return None
    try:
        with np.load(file) as content:
            names = [name for name in content.files if name != "made_from"]
            if content["made_from"].tolist() != _made_from(fingerprint, names).tolist():
                return None
            return {name: content[name] for name in names}
    except DAMAGED:
        return None


def _made_from(fingerprint: str, names: Iterable[str]) -> NDArray[np.str_]:
    """The fingerprint and the arrays' names, since an archive whose directory is damaged may have lost some."""
    return np.array([fingerprint, *names])
