from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from fettle import store
from fettle.errors import BusyError


class Crash(BaseException):
    """Stands for anything that ends a run, also what `except Exception` lets through."""


def leftovers(directory: Path) -> list[Path]:
    return list(directory.rglob(f"{store.TEMPORARY}*"))


def test_hash_of_a_file_is_the_hash_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(content)
    assert store.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest() == store.sha256_bytes(content)


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.write_atomic(path, b"a longer first version")
    store.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "file"
    store.write_atomic(path, b"old")

    def crash(*args: object) -> None:
        raise Crash

    monkeypatch.setattr(os, "fsync", crash) if moment == "fsync" else monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(Crash):
        store.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_new_directory_appears_only_when_it_is_full(tmp_path: Path) -> None:
    path = tmp_path / "variants" / "a"
    with store.new_directory(path) as new:
        (new / "deep").mkdir()
        (new / "deep" / "file").write_bytes(b"1")
        assert not path.exists()
    assert (path / "deep" / "file").read_bytes() == b"1"
    assert leftovers(tmp_path) == []


def fill_and_crash(path: Path) -> None:
    with store.new_directory(path) as new:
        (new / "file").write_bytes(b"new")
        raise Crash


def test_a_crash_while_filling_keeps_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with store.new_directory(path) as new:
        (new / "file").write_bytes(b"old")
    with pytest.raises(Crash):
        fill_and_crash(path)
    assert (path / "file").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_new_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with store.new_directory(path) as new:
        (new / "gone").write_bytes(b"old")
    with store.new_directory(path) as new:
        (new / "here").write_bytes(b"new")
    assert [file.name for file in path.iterdir()] == ["here"]


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    nested = tmp_path / "variants" / f"{store.TEMPORARY}abc" / f"{store.TEMPORARY}inner"
    nested.mkdir(parents=True)
    (nested / "file").write_bytes(b"half")
    (tmp_path / f"{store.TEMPORARY}file").write_bytes(b"half")
    (tmp_path / "variants" / "kept").write_bytes(b"whole")
    store.remove_leftovers(tmp_path)
    assert leftovers(tmp_path) == []
    assert (tmp_path / "variants" / "kept").exists()


def _hold(directory: Path, held: multiprocessing.Event, release: multiprocessing.Event) -> None:  # type: ignore[valid-type]
    with store.locked(directory):
        held.set()
        release.wait(30)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, release))
    process.start()
    try:
        assert held.wait(30)
        with pytest.raises(BusyError, match="another fettle run"), store.locked(tmp_path):
            pass
        process.kill()
        process.join(30)
        with store.locked(tmp_path):
            pass
    finally:
        process.kill()
        process.join(30)


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(Crash), store.locked(tmp_path):
        raise Crash
    with store.locked(tmp_path):
        pass
