"""Files of a family that somebody made or changed: nothing outside the directory is read, and no file brings code."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from fettle.errors import FamilyError, IntegrityError
from fettle.family import MANIFEST_FILE, TOKENIZER_FILE, Family, check_files, record_files
from fettle.manifest import FileRecord
from tests.fakes import make_fake_family
from tests.inprocess import make_router
from tests.unit.test_layering import PRODUCT, each, name_of, parse
from workers.engine import EngineOptions, open_engine
from workers.onnx_encoder import open_session

SECRET = np.arange(4, dtype=np.float32)
OUTSIDE = ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", "a\\..\\b", ""]


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_manifest_names_a_file_outside(path):
    with pytest.raises(ValidationError, match="relative path below"):
        FileRecord(path=path, sha256="0" * 64, bytes=1)


def external(folder: Path, location: str) -> Path:
    """A graph whose weight lies in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    made = tmp_path / "model"
    made.mkdir()
    return made


@pytest.mark.parametrize("where", ["upwards", "absolute", "around", "link"])
def test_weights_of_a_graph_are_never_read_from_outside(folder, where):
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    location = {
        "upwards": "../secret.bin",
        "absolute": str(folder.parent / "secret.bin"),
        "around": "./../model/../secret.bin",
        "link": "link.bin",
    }[where]
    path = external(folder, location)
    with pytest.raises(FamilyError, match=r"model\.onnx"):
        open_session(path, EngineOptions())
    with pytest.raises(onnx.checker.ValidationError):
        onnx.load(path)


def test_weights_beside_a_graph_are_read(folder):
    """What the test before refuses is refused for its place."""
    shutil.copy(folder.parent / "secret.bin", folder / "own.bin")
    session = open_session(external(folder, "own.bin"), EngineOptions())
    (found,) = session.run(None, {"x": np.zeros(4, np.float32)})
    assert np.array_equal(found, SECRET)


def test_a_link_that_leaves_the_directory_is_no_file_of_it(folder):
    (folder / "own.bin").write_bytes(b"x")
    (folder / "inner.bin").symlink_to("own.bin")
    (folder / "outer.bin").symlink_to(folder.parent / "secret.bin")
    records = record_files(folder)
    assert [record.path for record in records] == ["inner.bin", "outer.bin", "own.bin"]
    (problem,) = check_files(folder, records)
    assert isinstance(problem, IntegrityError)
    assert "outer.bin: a link that leaves" in problem.message


def test_a_family_may_be_reached_through_a_link(tmp_path):
    make_fake_family(tmp_path / "family")
    (tmp_path / "current").symlink_to("family")
    assert Family.open(tmp_path / "current").verify() == []


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_fake_family(tmp_path / "family")


def test_a_worker_reads_no_variant_that_was_changed_or_lies_elsewhere(family, tmp_path):
    variant = family.directory / "variants" / next(iter(family.variants))
    file = variant / next(record.path for record in family.variant(variant.name).files)
    content = file.read_bytes()
    shutil.move(file, tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(IntegrityError, match="leaves the directory"):
        open_engine(variant)
    file.unlink()
    file.write_bytes(content + b" ")
    with pytest.raises(IntegrityError, match="SHA-256"):
        open_engine(variant)


@pytest.mark.parametrize("change", ["content", "link"])
def test_a_router_reads_no_tokenizer_that_was_changed_or_lies_elsewhere(family, tmp_path, change):
    make_router([family])
    path = family.directory / TOKENIZER_FILE
    if change == "content":
        path.write_text(path.read_text() + " ")
    else:
        shutil.move(path, tmp_path / "moved.json")
        path.symlink_to(tmp_path / "moved.json")
    with pytest.raises(IntegrityError, match=path.name):
        make_router([family])


def test_a_variants_manifest_belongs_to_its_family(family):
    manifest = family.directory / "variants" / next(iter(family.variants)) / MANIFEST_FILE
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(FamilyError, match=MANIFEST_FILE):
        Family.open(family.directory)


# What it unpickles is no file, but the call of a process that has proven that it knows the replica's secret.
UNPICKLES = "deployments/wire.py"


@each(*PRODUCT)
def test_no_file_brings_code(path: Path):
    """Nothing else unpickles, none of transformers' loaders runs code of a checkpoint, none fetches pickled weights."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import) and name_of(path) != UNPICKLES:
            assert not {alias.name.partition(".")[0] for alias in node.names} & {"pickle", "dill", "joblib", "shelve"}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in {"pickle", "dill", "joblib", "shelve", "cloudpickle"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("torch.load", "eval", "exec"), f"line {node.lineno}: {called}"
            assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            if called.endswith(".from_pretrained"):
                assert given.get("trust_remote_code") == "False", f"line {node.lineno}: {called}"
                assert given.get("local_files_only") == "True", f"line {node.lineno}: {called}"
