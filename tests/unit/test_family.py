from __future__ import annotations

import json
from pathlib import Path

import pytest

from fettle.errors import FamilyError, IntegrityError
from fettle.family import Family
from tests.fakes import FakeVariant, change_json, make_fake_family
from workers.engine import open_engine


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_fake_family(tmp_path / "family", variants=[FakeVariant("original"), FakeVariant("cheap")])
    return tmp_path / "family"


def reseal(directory: Path, variant: str) -> None:
    """Make family.json agree with a manifest that was edited, so that the next check is the one that speaks."""
    from fettle.store import sha256_file

    path = directory / "family.json"
    content = json.loads(path.read_text())
    for entry in content["variants"]:
        if entry["id"] == variant:
            entry["manifest_sha256"] = sha256_file(directory / "variants" / variant / "manifest.json")
    path.write_text(json.dumps(content))


def flip_byte(path: Path, at: int = 10) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_an_intact_family_has_no_problems(directory: Path) -> None:
    family = Family.open(directory)
    assert family.verify() == []
    assert list(family.variants) == ["original", "cheap"]
    assert family.variant_path("cheap") == directory / "variants" / "cheap"


def test_a_moved_family_is_still_intact(directory: Path, tmp_path: Path) -> None:
    directory.rename(tmp_path / "elsewhere")
    assert Family.open(tmp_path / "elsewhere").verify() == []


@pytest.mark.parametrize("file", ["variants/cheap/weights.bin", "tokenizer/tokenizer.json"])
def test_a_flipped_byte_is_found_and_named(directory: Path, file: str) -> None:
    flip_byte(directory / file)
    (problem,) = Family.open(directory).verify()
    assert isinstance(problem, IntegrityError)
    assert str(directory / file) in problem.message
    assert "fettle optimize" in problem.message


def test_a_missing_file_is_found_and_named(directory: Path) -> None:
    (directory / "variants/cheap/weights.bin").unlink()
    (problem,) = Family.open(directory).verify()
    assert str(directory / "variants/cheap/weights.bin") in problem.message
    assert "missing" in problem.message


def test_every_problem_is_listed(directory: Path) -> None:
    flip_byte(directory / "variants/original/weights.bin")
    (directory / "variants/cheap/weights.bin").unlink()
    (directory / "variants/cheap/stranger.bin").write_bytes(b"?")
    problems = [problem.message for problem in Family.open(directory).verify()]
    assert len(problems) == 3
    assert any("stranger.bin" in problem and "no manifest lists" in problem for problem in problems)


def test_a_worker_refuses_a_flipped_byte(directory: Path) -> None:
    flip_byte(directory / "variants/cheap/weights.bin")
    with pytest.raises(IntegrityError, match=r"weights\.bin"):
        open_engine(directory / "variants" / "cheap")


def test_a_worker_refuses_a_missing_manifest(directory: Path) -> None:
    (directory / "variants/cheap/manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"manifest\.json: missing"):
        open_engine(directory / "variants" / "cheap")


def test_an_edited_manifest_is_refused(directory: Path) -> None:
    change_json(directory / "variants/cheap/manifest.json", precision="int8")
    with pytest.raises(IntegrityError, match=r"cheap/manifest\.json"):
        Family.open(directory)


@pytest.mark.parametrize("file", ["family.json", "variants/cheap/manifest.json"])
def test_an_unknown_schema_version_is_refused(directory: Path, file: str) -> None:
    change_json(directory / file, schema_version=99)
    reseal(directory, "cheap")
    with pytest.raises(FamilyError, match="schema version 99, this fettle reads version 1") as caught:
        Family.open(directory)
    assert str(directory / file) in caught.value.message


@pytest.mark.parametrize("file", ["family.json", "variants/cheap/manifest.json"])
def test_a_foreign_key_is_refused(directory: Path, file: str) -> None:
    change_json(directory / file, surprise=1)
    reseal(directory, "cheap")
    with pytest.raises(FamilyError, match="surprise") as caught:
        Family.open(directory)
    assert str(directory / file) in caught.value.message


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "a/../../b", "..\\b", ""])
def test_a_path_out_of_the_directory_is_refused(directory: Path, path: str) -> None:
    manifest = directory / "variants/cheap/manifest.json"
    record = {"path": path, "sha256": "0" * 64, "bytes": 1}
    change_json(manifest, files=[record])
    reseal(directory, "cheap")
    with pytest.raises(FamilyError, match="relative path below"):
        Family.open(directory)


@pytest.mark.parametrize("name", ["../cheap", "a/b", "", ".hidden"])
def test_a_variant_id_cannot_be_a_path(directory: Path, name: str) -> None:
    change_json(directory / "family.json", default=name)
    with pytest.raises(FamilyError, match="default"):
        Family.open(directory)


def test_a_default_that_is_not_there_is_refused(directory: Path) -> None:
    change_json(directory / "family.json", default="absent")
    with pytest.raises(FamilyError, match="default variant 'absent'"):
        Family.open(directory)


def test_a_directory_without_a_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match="is not a family"):
        Family.open(tmp_path)


def test_broken_json_is_named(directory: Path) -> None:
    (directory / "family.json").write_text('{"schema_version": 1,')
    with pytest.raises(FamilyError, match=r"family\.json: not valid JSON"):
        Family.open(directory)


def test_json_that_is_no_object_is_refused(directory: Path) -> None:
    (directory / "family.json").write_text("[1, 2]")
    with pytest.raises(FamilyError, match="schema version None"):
        Family.open(directory)


def test_an_unknown_variant_lists_those_there_are(directory: Path) -> None:
    with pytest.raises(FamilyError, match="it has cheap, original"):
        Family.open(directory).variant("absent")
