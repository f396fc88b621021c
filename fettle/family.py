"""A family directory: open it, verify it, add to it. The only reader and writer of the manifests.

family.json                    FamilyManifest
tokenizer/tokenizer.json       shared by all variants, so that a text is tokenized once whoever answers it
variants/<id>/manifest.json    VariantManifest, and the files that it lists
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from fettle.errors import FamilyError, IntegrityError
from fettle.manifest import SCHEMA_VERSION, FamilyManifest, FileRecord, VariantManifest
from fettle.store import TEMPORARY, sha256_bytes, sha256_file, write_atomic

FAMILY_FILE = "family.json"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer/tokenizer.json"

Model = TypeVar("Model", bound=BaseModel)


class Family:
    """An opened family: manifests parsed and their hashes checked, model files not yet read."""

    def __init__(self, directory: Path, manifest: FamilyManifest, variants: dict[str, VariantManifest]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.variants = variants

    @classmethod
    def open(cls, directory: Path | str) -> Family:
        """Read the manifests.

        Raises:
            FamilyError: no family there, another schema version, or a malformed manifest.
            IntegrityError: a variant's manifest is not the one that the family was written with.
        """
        directory = Path(directory)
        if not (directory / FAMILY_FILE).is_file():
            raise FamilyError(f"{directory} is not a family (it has no {FAMILY_FILE}); make one with `fettle optimize`")
        manifest = parse_manifest(directory / FAMILY_FILE, FamilyManifest)
        variants = {}
        for entry in manifest.variants:
            path = variant_directory(directory, entry.id) / MANIFEST_FILE
            check_hash(path, entry.manifest_sha256)
            variants[entry.id] = parse_manifest(path, VariantManifest)
        for role, name in (("reference", manifest.reference), ("default", manifest.default)):
            if name not in variants:
                raise FamilyError(f"{directory / FAMILY_FILE}: the {role} variant {name!r} is not among its variants")
        return cls(directory, manifest, variants)

    @property
    def name(self) -> str:
        return self.manifest.name

    @cached_property
    def version(self) -> str:
        """Names what is served: eight hex digits over the variants, the tokenizer and the task, not the points.

        Two directories with the same version hold the same models; a new certificate makes no new version.
        """
        manifest = self.manifest
        parts = manifest.model_dump(
            mode="json", include={"variants", "tokenizer", "tokenizer_files", "task", "reference"}
        )
        return sha256_bytes(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))[:8]

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / TOKENIZER_FILE

    def variant(self, name: str) -> VariantManifest:
        """The manifest of a variant.

        Raises:
            FamilyError: the family has none of that name.
        """
        if name not in self.variants:
            raise FamilyError(
                f"family {self.name!r} has no variant {name!r}; it has {', '.join(sorted(self.variants))}"
            )
        return self.variants[name]

    def variant_path(self, name: str) -> Path:
        return variant_directory(self.directory, self.variant(name).id)

    def verify(self) -> list[IntegrityError | FamilyError]:
        """Recompute every hash; also report files that no manifest knows. An empty list means intact."""
        problems: list[IntegrityError | FamilyError] = []
        problems += check_files(self.directory, self.manifest.tokenizer_files)
        for name, variant in self.variants.items():
            folder = variant_directory(self.directory, name)
            problems += check_files(folder, variant.files)
            known = {record.path for record in variant.files} | {MANIFEST_FILE}
            for path in sorted(file for file in folder.rglob("*") if file.is_file()):
                if str(path.relative_to(folder)) not in known:
                    problems.append(
                        IntegrityError(f"{path}: no manifest lists this file; delete it or run optimize again")
                    )
        return problems


def variant_directory(family: Path, name: str) -> Path:
    return family / "variants" / name


def parse_manifest(path: Path, model: type[Model]) -> Model:
    """Parse one manifest file.

    Raises:
        IntegrityError: the file is missing.
        FamilyError: it is not JSON, has another schema version, or breaks the schema; names file and field.
    """
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; run `fettle optimize` again to restore it") from None
    except orjson.JSONDecodeError as error:
        raise FamilyError(f"{path}: not valid JSON ({error}); restore it or run `fettle optimize` again") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise FamilyError(
            f"{path}: schema version {version!r}, this fettle reads version {SCHEMA_VERSION}; "
            "run `fettle optimize` again or use the fettle that wrote it"
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise FamilyError(f"{path}: {describe_validation(error)}; restore it or run `fettle optimize` again") from None


def dump_manifest(manifest: BaseModel) -> bytes:
    return orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)


def write_manifest(path: Path, manifest: BaseModel) -> str:
    """Write atomically; returns the hex SHA-256 of what was written."""
    data = dump_manifest(manifest)
    write_atomic(path, data)
    return sha256_bytes(data)


def record_files(directory: Path) -> list[FileRecord]:
    """Hash everything below `directory`, except the manifest itself."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [
        FileRecord(path=str(path.relative_to(directory)), sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in files
        if path.name != MANIFEST_FILE and not path.name.startswith(TEMPORARY)
    ]


def check_files(directory: Path, records: Iterable[FileRecord]) -> list[IntegrityError | FamilyError]:
    """What is wrong with the files: missing, changed, or, by way of a link, elsewhere."""
    problems: list[IntegrityError | FamilyError] = []
    root = directory.resolve()
    for record in records:
        path = directory / record.path
        try:
            if not path.resolve().is_relative_to(root):
                raise IntegrityError(f"{path}: a link that leaves the directory; put the file itself there")
            check_hash(path, record.sha256)
        except IntegrityError as error:
            problems.append(error)
    return problems


def check_hash(path: Path, expected: str) -> None:
    """Raises IntegrityError, with the file's name and the remedy, unless the content has that hash."""
    if not path.is_file():
        raise IntegrityError(f"{path}: missing; run `fettle optimize` again to restore it")
    if sha256_file(path) != expected:
        raise IntegrityError(
            f"{path}: its content is not what the manifest says (SHA-256 differs); "
            "copy it again from the original or run `fettle optimize` again"
        )


def describe_validation(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line, with the field's path."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the document"
    more = error.error_count() - 1
    return f"{where}: {first['msg']}" + (f" (and {more} more)" if more else "")
