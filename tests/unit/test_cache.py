"""What a run keeps to go on from: reused while it is whole and made from the same things, else computed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fettle.manifest import PassRecord
from fettle.store import TEMPORARY
from optimize.cache import FOLDER, RECORD_FILE, Arrays, Cache, Made

ONE, OTHER = "1" * 64, "2" * 64


class Counted:
    """Arrays that say how often they were computed."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Arrays:
        self.times += 1
        return {"values": np.full((3, 2), self.times, np.float32), "more": np.arange(4, dtype=np.float32)}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def test_arrays_are_computed_once_for_a_fingerprint(cache: Cache, tmp_path: Path) -> None:
    compute = Counted()
    assert not cache.has_arrays("deep/answers", ONE)
    first = cache.arrays("deep/answers", ONE, compute)
    assert cache.has_arrays("deep/answers", ONE)
    again = Cache(tmp_path).arrays("deep/answers", ONE, compute)
    assert compute.times == 1
    assert list(again) == list(first) == ["values", "more"]
    for name in first:
        np.testing.assert_array_equal(again[name], first[name])
        assert again[name].dtype == np.float32
    assert [path.name for path in (tmp_path / FOLDER / "deep").iterdir()] == ["answers.npz"]


def test_another_fingerprint_computes_again_and_replaces(cache: Cache) -> None:
    compute = Counted()
    cache.arrays("answers", ONE, compute)
    assert not cache.has_arrays("answers", OTHER)
    assert cache.arrays("answers", OTHER, compute)["values"][0, 0] == 2
    assert not cache.has_arrays("answers", ONE)
    assert compute.times == 2


@pytest.mark.parametrize("content", [b"", b"PK", b"neither zip nor array", b"\x93NUMPY"])
def test_a_file_that_is_no_archive_is_computed_again(cache: Cache, content: bytes) -> None:
    path = cache.path("answers.npz")
    path.parent.mkdir()
    path.write_bytes(content)
    compute = Counted()
    assert cache.arrays("answers", ONE, compute)["values"][0, 0] == 1
    assert compute.times == 1
    assert cache.has_arrays("answers", ONE)


def test_damage_anywhere_in_a_file_gives_the_same_arrays_or_none(cache: Cache) -> None:
    cache.arrays("answers", ONE, Counted())
    path = cache.path("answers.npz")
    whole = path.read_bytes()
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        assert not cache.has_arrays("answers", ONE), cut
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found = cache.arrays("answers", ONE, lambda: {"computed": np.zeros(1, np.float32)})
        if "computed" not in found:
            # What an archive says of dates and permissions is not covered by its checksums.
            assert list(found) == ["values", "more"]
            np.testing.assert_array_equal(found["values"], np.full((3, 2), 1, np.float32))


def test_a_failing_computation_leaves_nothing(cache: Cache, tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.arrays("answers", ONE, fail)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_is_there_when_its_record_is_written_and_the_block_ends(cache: Cache) -> None:
    made = Made(fingerprint=ONE, passes=[PassRecord(name="distill", seconds=1.5)], facts={"layers": [1, 2]})
    with cache.making("students/one") as (folder, finish):
        (folder / "weights").write_bytes(b"w")
        finish(made)
        assert cache.made("students/one", ONE) is None
    assert cache.made("students/one", ONE) == made
    assert cache.made("students/one", OTHER) is None
    assert sorted(path.name for path in cache.path("students/one").iterdir()) == sorted([RECORD_FILE, "weights"])


def test_a_folder_that_fails_leaves_the_one_before(cache: Cache, tmp_path: Path) -> None:
    with cache.making("student") as (folder, finish):
        (folder / "weights").write_bytes(b"old")
        finish(Made(fingerprint=ONE))

    def half() -> None:
        with cache.making("student") as (folder, finish):
            (folder / "weights").write_bytes(b"new")
            finish(Made(fingerprint=OTHER))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert cache.made("student", ONE) is not None
    assert (cache.path("student") / "weights").read_bytes() == b"old"
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("content", ["", "{}", '{"fingerprint": "short"}', "[1", '{"stranger": 1}'])
def test_a_broken_record_counts_as_none(cache: Cache, content: str) -> None:
    with cache.making("student") as (_, finish):
        finish(Made(fingerprint=ONE))
    (cache.path("student") / RECORD_FILE).write_text(content)
    assert cache.made("student", ONE) is None
