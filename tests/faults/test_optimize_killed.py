"""SIGKILL or a full disk at any moment of `fettle optimize` leaves a directory that the next run completes."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fettle.config import OptimizeConfig
from fettle.family import MANIFEST_FILE, Family, check_files, parse_manifest
from fettle.manifest import VariantManifest
from fettle.store import TEMPORARY, sha256_file
from optimize import measure
from optimize.finish import DROPPED_FOLDER
from optimize.recipes import ONNX_REFERENCE as ONNX_ID
from optimize.recipes import REFERENCE as REFERENCE_ID
from tests.fake_optimize import REFERENCE, config_for, fake_pass, fake_recipe, install, run, write_data
from tests.fakes import tokenizer_json

ONNX_REFERENCE = fake_recipe(ONNX_ID, fake_pass(ONNX_ID, ms_per_call=0.05))
# Larger and slower than any other, so each run sets it aside, and the next one takes it back.
POOR = fake_recipe("poor", fake_pass("as poor as can be", ms_per_call=0.2), parent=ONNX_ID)
CHILD = fake_recipe("child", parent="cheap")
FIRST_PLAN = [REFERENCE, ONNX_REFERENCE, POOR, fake_recipe("cheap", fake_pass("cheap", ms_per_call=0.01)), CHILD]
SECOND_PLAN = [REFERENCE, ONNX_REFERENCE, POOR, fake_recipe("cheap", fake_pass("sharp")), CHILD]
# Every step by which the pipeline changes the disk goes through one of these; the first ones need room on it.
FILLING = ((os, "fsync"), (Path, "mkdir"), (Path, "write_bytes"))
TOUCHES = (*FILLING, (Path, "replace"), (Path, "rename"), (shutil, "rmtree"))
# Every k-th touch of a run, so that about as many are tried: each costs a run that fails and one that completes it.
TRIED = 24
LEVEL = 0.2


def on_touch(patch: pytest.MonkeyPatch, touches: tuple[tuple[object, str], ...], act: Callable[[int], None]) -> None:
    """Call `act` with 1, 2 and so on before each of these."""
    count = 0

    def counting(real: Callable[..., object]) -> Callable[..., object]:
        def touching(*args: object, **named: object) -> object:
            nonlocal count
            count += 1
            act(count)
            return real(*args, **named)

        return touching

    for owner, name in touches:
        patch.setattr(owner, name, counting(getattr(owner, name)))


def touches_of(config: OptimizeConfig, touches: tuple[tuple[object, str], ...]) -> range:
    """Which touches of this run are tried: evenly spread, the last one among them."""
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        on_touch(patch, touches, seen.append)
        run(config)
    assert len(seen) > 20, "the run touched the disk less often than it must"
    return range(len(seen), 0, -math.ceil(len(seen) / TRIED))


def killed_at(touch: int, config: OptimizeConfig) -> bool:
    """Run in a forked process that kills itself at the given touch of the disk; false if it came to its end."""

    def kill(count: int) -> None:
        if count == touch:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        on_touch(pytest.MonkeyPatch(), TOUCHES, kill)
        try:
            run(config)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def check_whole(family: Family) -> None:
    assert family.verify() == []
    assert list(family.variants) == [REFERENCE_ID, ONNX_ID, "cheap", "child"]
    assert all(variant.measured is not None for variant in family.variants.values())
    (level,) = family.manifest.levels
    (point,) = family.manifest.points
    assert level.point == point.id
    assert point.test is not None
    assert point.test.disagreement == 0
    (dropped,) = family.manifest.dropped
    aside = family.directory / "variants" / dropped.id / MANIFEST_FILE
    assert dropped.id == "poor"
    assert sha256_file(aside) == dropped.manifest_sha256
    files = parse_manifest(aside, VariantManifest).files
    assert files
    assert check_files(family.directory / DROPPED_FOLDER / "poor", files) == []
    assert (family.directory / "report.html").is_file()
    check_clean(family.directory)


def check_clean(directory: Path) -> None:
    assert not list(directory.rglob(f"{TEMPORARY}*"))


@pytest.fixture(params=[False, True], ids=["a new family", "a family that changes"])
def before(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OptimizeConfig:
    """How to run on what is in `out`: nothing yet, or a finished family of other recipes."""
    write_data(tmp_path / "data.jsonl", 200)
    monkeypatch.setattr(measure, "BATCHES", [1])
    config = config_for(tmp_path, levels=[LEVEL])
    config.out.mkdir()
    if request.param:
        install(monkeypatch, FIRST_PLAN)
        run(config)
    install(monkeypatch, SECOND_PLAN)
    monkeypatch.setattr(measure, "LATENCY_SECONDS", 1e-6)
    return config


def copy_of(config: OptimizeConfig, name: str) -> OptimizeConfig:
    out = config.out.with_name(name)
    shutil.copytree(config.out, out)
    return config.model_copy(update={"out": out})


def test_killed_at_any_touch_of_the_disk(before: OptimizeConfig) -> None:
    touches = touches_of(copy_of(before, "counted"), TOUCHES)
    assert not killed_at(touches[0] + 1, copy_of(before, "not-killed"))
    for touch in touches:
        config = copy_of(before, f"family-{touch}")
        assert killed_at(touch, config)
        check_whole(run(config))


def test_the_disk_full_from_any_touch_on(before: OptimizeConfig) -> None:
    for touch in touches_of(copy_of(before, "counted"), FILLING):
        config = copy_of(before, f"family-{touch}")

        def refuse(count: int, touch: int = touch) -> None:
            if count >= touch:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            on_touch(patch, FILLING, refuse)
            with pytest.raises(OSError, match="No space left") as caught:
                run(config)
        assert caught.value.errno == errno.ENOSPC
        check_clean(config.out)
        check_whole(run(config))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real BERT classifier with random weights and two small layers."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("model")
    config = transformers.BertConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
        id2label={0: "red", 1: "green", 2: "blue"},
        label2id={"red": 0, "green": 1, "blue": 2},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(tokenizer_json())
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def first_build_under_way(out: Path) -> bool:
    return any(out.glob(f"variants/{TEMPORARY}*"))


def export_done(out: Path) -> bool:
    return (out / "variants" / "onnx-fp32" / "manifest.json").exists()


def first_measured(out: Path) -> bool:
    manifest = out / "variants" / REFERENCE_ID / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["measured"] is not None


def heads_trained(out: Path) -> bool:
    return any(out.glob(".work/students/heads-*/made.json"))


def first_traced(out: Path) -> bool:
    return any(out.glob(".work/traces/*.npz"))


@pytest.mark.slow
def test_the_real_command_killed_five_times(tmp_path: Path, tiny_model: Path) -> None:
    data, out = write_data(tmp_path / "data.jsonl"), tmp_path / "family"
    command = [sys.executable, "-m", "fettle.cli", "optimize", str(tiny_model), "--data", str(data), "--out", str(out)]
    command += ["--recipe", "onnx-int8-dynamic", "--recipe", "exits-frozen-int8", "--max-rows", "32", "--json"]
    for moment in (first_build_under_way, first_measured, export_done, heads_trained, first_traced):
        kill_at(moment, command, out)
    weights = out / "variants" / REFERENCE_ID / "model.safetensors"
    built = weights.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    made = {item["id"] for item in [*shown["variants"], *shown["dropped"]]}
    assert made >= {REFERENCE_ID, "onnx-fp32", "onnx-int8-dynamic", "exits-frozen-int8"}
    assert Family.open(out).verify() == []
    for step in ("build onnx-int8-dynamic", "train exit heads of exits-frozen"):
        assert f"{step} (already there" in done.stderr
    assert not list(out.rglob(f"{TEMPORARY}*"))
    assert weights.stat().st_mtime_ns == built, "a finished variant was built again"


def kill_at(moment: Callable[[Path], bool], command: list[str], out: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not moment(out):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert not (out / "family.json").exists()
