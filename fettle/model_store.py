"""Families at a URL (`s3://`, `gs://`, `https://`, whatever fsspec knows): copied to a node once, verified, bounded.

A node's cache has two parts: `families`, with manifests and tokenizers, which is all that a router reads, and
`variants`, with the model files of one variant each, named by the hash of its manifest. A copy appears by one rename
when it is whole; what was broken off goes on where it stopped. Processes of a node wait for each other, so each file
comes once. A process that uses a variant holds a lock on it, which the kernel drops with the process; what nobody holds
may be evicted.

A path without `://` is served where it is, and nothing here concerns it. A family at a URL does not change: new points
or models are a new URL.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from fettle.config import StoreConfig
from fettle.errors import FamilyError, IntegrityError, UsageError
from fettle.family import FAMILY_FILE, MANIFEST_FILE, Family, check_hash, parse_manifest
from fettle.manifest import FamilyManifest, FileRecord, VariantManifest
from fettle.store import new_directory, sha256_bytes, sha256_file

logger = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
PARTIAL = "partial"
# A file whose content is wrong is fetched so many times.
ATTEMPTS = 2
# The locks of this process on what it uses.
HELD: dict[Path, IO[str]] = {}

Loaded = TypeVar("Loaded")


def is_url(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    """For processes with working directories of their own; a URL is the same everywhere."""
    return path if is_url(path) else str(Path(path).resolve())


@dataclass(frozen=True, slots=True)
class VariantFiles:
    """One variant of a family at a path or a URL; what a replica is told of the files that it is to load."""

    path: str
    variant: str
    manifest_sha256: str
    store: StoreConfig

    def load(self, open_it: Callable[[Path], Loaded]) -> Loaded:
        """What is made of the files; where a copy of theirs is broken, it is fetched again once.

        Raises:
            FamilyError, IntegrityError, UsageError: see `ModelStore.variant`, and what `open_it` raises.
        """
        store = ModelStore(self.store)
        directory = store.variant(self.path, self.variant, self.manifest_sha256)
        try:
            return open_it(directory)
        except IntegrityError as error:
            if not is_url(self.path):
                raise
            logger.warning("the copy of %s is broken and is fetched again: %s", self.variant, error)
            store.discard(directory)
            return open_it(store.variant(self.path, self.variant, self.manifest_sha256))


class ModelStore:
    """A node's cache."""

    def __init__(self, config: StoreConfig) -> None:
        self._root = Path(config.cache).expanduser()
        self._max_bytes = config.max_bytes

    def family(self, path: str) -> Family:
        """Open a family; of one at a URL manifests and tokenizer are fetched first.

        Raises:
            FamilyError, IntegrityError: it is not there, or not what its manifests say.
            UsageError: this kind of URL needs a package that is not installed.
        """
        if not is_url(path):
            return Family.open(path)
        files = Files(path)
        content = files.read(FAMILY_FILE)
        name = sha256_bytes(path.encode() + content)[:32]
        target = self._root / "families" / name
        with self._alone(f"family-{name}"):
            if not target.is_dir():
                with new_directory(target) as made:
                    _fetch_family(files, content, made)
        return Family.open(target)

    def variant(self, path: str, variant: str, manifest_sha256: str) -> Path:
        """The local directory of a variant, its files fetched if need be; held until this process ends.

        Raises:
            FamilyError, IntegrityError, UsageError: as `family`.
        """
        if not is_url(path):
            return Path(path) / "variants" / variant
        target = self._root / "variants" / manifest_sha256[:32]
        self._hold(target.name)
        with self._alone(f"variant-{target.name}"):
            if not target.is_dir():
                self._fetch_variant(Files(f"{path.rstrip('/')}/variants/{variant}"), manifest_sha256, target)
        return target

    def discard(self, directory: Path) -> None:
        """Forget a copy that turned out to be broken, so that the next use fetches it again."""
        if directory.parent == self._root / "variants":
            with self._alone(f"variant-{directory.name}"):
                shutil.rmtree(directory, ignore_errors=True)

    def _fetch_variant(self, files: Files, manifest_sha256: str, target: Path) -> None:
        content = files.read(MANIFEST_FILE)
        partial = self._root / PARTIAL / target.name
        partial.mkdir(parents=True, exist_ok=True)
        (partial / MANIFEST_FILE).write_bytes(content)
        check_hash(partial / MANIFEST_FILE, manifest_sha256)
        manifest = parse_manifest(partial / MANIFEST_FILE, VariantManifest)
        self._make_room(manifest.size_bytes)
        for record in manifest.files:
            files.fetch(record, partial / record.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)

    def _make_room(self, needed: int) -> None:
        """Evict what nobody uses, the longest unused first, until this fits the bound; a larger one is let in alone."""
        with self._alone("eviction"):
            kept = {path: _size(path) for path in (self._root / "variants").glob("*") if path.is_dir()}
            for path in sorted(kept, key=lambda path: self._use_file(path.name).stat().st_mtime):
                if sum(kept.values()) + needed <= self._max_bytes:
                    return
                if self._evicted(path):
                    logger.warning("model cache: %s is evicted, %d bytes", path.name, kept.pop(path))

    def _evicted(self, path: Path) -> bool:
        with self._use_file(path.name).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            shutil.rmtree(path, ignore_errors=True)
            return True

    def _hold(self, name: str) -> None:
        path = self._use_file(name)
        if path not in HELD:
            HELD[path] = file = path.open("a")
            fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(path)

    def _use_file(self, name: str) -> Path:
        path = self._root / "locks" / f"{name}.use"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=True)
        return path

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Wait until no other process of this node does the same."""
        path = self._root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Files:
    """The files below a URL."""

    def __init__(self, url: str) -> None:
        """Raises UsageError for a kind of URL that needs a package which is not there."""
        import fsspec

        self._url = url
        try:
            self._system, self._base = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: this kind of URL cannot be read ({error}); install what it names") from None

    def read(self, path: str) -> bytes:
        """A small file. Raises FamilyError if it cannot be read."""
        with self._explained(path):
            content: bytes = self._system.cat_file(self._where(path))
        return content

    def fetch(self, record: FileRecord, target: Path) -> None:
        """Copy a file, but not what an earlier attempt left. Raises IntegrityError if its content is wrong."""
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(ATTEMPTS):
            self._go_on(record, target)
            if target.stat().st_size == record.bytes and sha256_file(target) == record.sha256:
                return
            target.unlink()
        raise IntegrityError(
            f"{self._url}/{record.path}: its content is not what the manifest says (SHA-256 differs); upload it again"
        )

    def _go_on(self, record: FileRecord, target: Path) -> None:
        have = target.stat().st_size if target.exists() else 0
        if have > record.bytes:
            target.unlink()
            have = 0
        with self._explained(record.path), target.open("ab") as out:
            if have == record.bytes:
                return
            with self._system.open(self._where(record.path), "rb", block_size=PIECE_BYTES) as source:
                if have:
                    source.seek(have)
                while piece := source.read(PIECE_BYTES):
                    out.write(piece)
            out.flush()
            os.fsync(out.fileno())

    def _where(self, path: str) -> str:
        return f"{self._base.rstrip('/')}/{path}"

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise FamilyError(f"{self._url} has no {path}; is it a family, made by `fettle optimize`?") from None
        except Exception as error:
            # Every file system has errors of its own: connections, rights, keys.
            raise FamilyError(f"{self._url}/{path}: cannot be read ({type(error).__name__}: {error})") from error


def _fetch_family(files: Files, content: bytes, made: Path) -> None:
    (made / FAMILY_FILE).write_bytes(content)
    manifest = parse_manifest(made / FAMILY_FILE, FamilyManifest)
    for record in manifest.tokenizer_files:
        files.fetch(record, made / record.path)
    for entry in manifest.variants:
        path = made / "variants" / entry.id / MANIFEST_FILE
        path.parent.mkdir(parents=True)
        path.write_bytes(files.read(f"variants/{entry.id}/{MANIFEST_FILE}"))


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
