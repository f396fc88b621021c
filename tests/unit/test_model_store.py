"""Families at URLs, in fsspec's memory and on a local HTTP server: fetched once, whole, verified, bounded."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from fettle import model_store
from fettle.config import FamilyConfig, RolloutConfig, ServeConfig, StoreConfig
from fettle.errors import FamilyError, IntegrityError, UsageError
from fettle.family import Family
from fettle.model_store import ModelStore, VariantFiles
from tests.fakes import FakeVariant, make_fake_family
from workers.engine import open_engine

VARIANTS = [FakeVariant("fp32"), FakeVariant("int8")]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_fake_family(tmp_path / "origin", variants=VARIANTS)


@pytest.fixture
def url(family: Family) -> Iterator[str]:
    """The family's copy in memory, as a bucket would have it."""
    memory = fsspec.filesystem("memory")
    memory.put(str(family.directory), "/bucket/family", recursive=True)
    yield "memory://bucket/family"
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[StoreConfig]:
    yield StoreConfig(cache=str(tmp_path / "cache"))
    while model_store.HELD:
        model_store.HELD.popitem()[1].close()


def files_of(url: str, family: Family, variant: str, config: StoreConfig) -> VariantFiles:
    [sha] = [entry.manifest_sha256 for entry in family.manifest.variants if entry.id == variant]
    return VariantFiles(url, variant, sha, config)


def test_a_path_is_served_where_it_is(family: Family, config: StoreConfig):
    store = ModelStore(config)
    assert store.family(str(family.directory)).directory == family.directory
    assert files_of(str(family.directory), family, "int8", config).load(Path) == family.variant_path("int8")
    assert not Path(config.cache).exists()


def test_a_router_fetches_manifests_and_tokenizer_and_no_model(family: Family, url: str, config: StoreConfig):
    found = ModelStore(config).family(url)
    assert (found.manifest, found.variants) == (family.manifest, family.variants)
    assert found.tokenizer_path.read_bytes() == family.tokenizer_path.read_bytes()
    assert not list(Path(config.cache).rglob("weights.bin"))


def test_a_replica_fetches_its_own_variant(family: Family, url: str, config: StoreConfig):
    engine = files_of(url, family, "int8", config).load(open_engine)
    assert engine.manifest == family.variant("int8")
    assert len(list(Path(config.cache).rglob("weights.bin"))) == 1


def test_what_is_there_is_not_fetched_again(family: Family, url: str, config: StoreConfig, monkeypatch):
    files = files_of(url, family, "int8", config)
    files.load(Path)
    monkeypatch.setattr(model_store.Files, "fetch", lambda *_: pytest.fail("fetched again"))
    files.load(Path)


def test_a_broken_copy_is_fetched_again(family: Family, url: str, config: StoreConfig):
    files = files_of(url, family, "int8", config)
    copy = files.load(Path)
    (copy / "weights.bin").write_bytes(b"a bit that has tipped over")
    assert files.load(open_engine).manifest.id == "int8"
    assert (copy / "weights.bin").read_bytes() == (family.variant_path("int8") / "weights.bin").read_bytes()


def test_what_was_broken_off_goes_on_where_it_stopped(family: Family, url: str, config: StoreConfig, monkeypatch):
    files = files_of(url, family, "int8", config)
    partial_file = Path(config.cache) / "partial" / files.manifest_sha256[:32] / "weights.bin"
    partial_file.parent.mkdir(parents=True)
    whole = (family.variant_path("int8") / "weights.bin").read_bytes()
    partial_file.write_bytes(whole[:100])
    begun = []
    plain = fsspec.implementations.memory.MemoryFile.seek

    def seek(self, *args):
        begun.append(args[0])
        return plain(self, *args)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "seek", seek)
    assert files.load(open_engine).manifest.id == "int8"
    assert 100 in begun


@pytest.mark.parametrize("rest", [b"x" * 50, b"x" * 100_000], ids=["wrong beginning", "too long"])
def test_a_wrong_beginning_is_thrown_away(family: Family, url: str, config: StoreConfig, rest: bytes):
    files = files_of(url, family, "int8", config)
    partial_file = Path(config.cache) / "partial" / files.manifest_sha256[:32] / "weights.bin"
    partial_file.parent.mkdir(parents=True)
    partial_file.write_bytes(rest)
    assert files.load(open_engine).manifest.id == "int8"


def test_a_wrong_file_at_the_url_is_an_error_and_no_copy(family: Family, url: str, config: StoreConfig):
    fsspec.filesystem("memory").pipe("/bucket/family/variants/int8/weights.bin", b"wrong")
    with pytest.raises(IntegrityError, match="upload it again"):
        files_of(url, family, "int8", config).load(open_engine)
    assert not list((Path(config.cache) / "variants").glob("*"))


def test_a_manifest_that_the_family_does_not_know_is_refused(family: Family, url: str, config: StoreConfig):
    memory = fsspec.filesystem("memory")
    other = memory.cat_file("/bucket/family/variants/fp32/manifest.json")
    memory.pipe("/bucket/family/variants/int8/manifest.json", other)
    with pytest.raises(IntegrityError):
        files_of(url, family, "int8", config).load(open_engine)


def test_no_family_there(config: StoreConfig):
    with pytest.raises(FamilyError, match=r"has no family\.json"):
        ModelStore(config).family("memory://bucket/nothing")


def test_a_kind_of_url_that_nobody_knows(config: StoreConfig):
    with pytest.raises(UsageError, match="cannot be read"):
        ModelStore(config).family("nowhere://bucket/family")


def test_what_nobody_uses_makes_room(family: Family, url: str, config: StoreConfig):
    size = sum(file.stat().st_size for file in family.variant_path("int8").rglob("*"))
    small = config.model_copy(update={"max_bytes": size})
    first = files_of(url, family, "fp32", small).load(Path)
    second = files_of(url, family, "int8", small).load(Path)
    assert first.is_dir(), "it is in use, so it stays although there is no room"
    model_store.HELD.pop(Path(small.cache) / "locks" / f"{first.name}.use").close()
    ModelStore(small).discard(second)
    files_of(url, family, "int8", small).load(Path)
    assert not first.exists()
    assert second.is_dir()


def test_processes_that_start_together_fetch_once(family: Family, tmp_path: Path):
    """Over HTTP, where each request is counted."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(family.directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    files = files_of(url, family, "int8", StoreConfig(cache=str(tmp_path / "cache")))
    try:
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            names = pool.map(loaded_name, [files] * 2)
    finally:
        server.shutdown()
    assert names == ["int8"] * 2
    assert sum(path.endswith("weights.bin") for path in asked) == 1


def loaded_name(files: VariantFiles) -> str:
    return files.load(open_engine).manifest.id


def test_evidence_about_a_family_at_a_url_needs_a_place():
    family = FamilyConfig(path="s3://bucket/family")
    with pytest.raises(ValidationError, match=r"monitor\.directory is needed, since families\.0\.path is a URL"):
        ServeConfig(families=[family])
    with pytest.raises(ValidationError, match="all nodes share"):
        ServeConfig(families=[FamilyConfig(path="a", rollout=RolloutConfig(path="gs://bucket/new"))])
    assert ServeConfig.model_validate({"families": [family], "monitor": {"directory": "/shared"}})
