"""SIGKILL at any moment of `fettle optimize` leaves a directory that the next run completes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fettle.config import OptimizeConfig
from fettle.family import Family
from fettle.store import TEMPORARY
from optimize import measure
from optimize.recipes import REFERENCE as REFERENCE_ID
from tests.fake_optimize import REFERENCE, config_for, fake_pass, fake_recipe, install, run, write_data
from tests.fakes import tokenizer_json

FIRST_PLAN = [REFERENCE, fake_recipe("cheap"), fake_recipe("child", parent="cheap")]
SECOND_PLAN = [REFERENCE, fake_recipe("cheap", fake_pass("changed", ms_per_call=0.01)), FIRST_PLAN[2]]
# Every step by which the pipeline changes the disk goes through one of these.
TOUCHES = ((os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "mkdir"), (Path, "write_bytes"))
ENOUGH = 500


def killed_at(touch: int, config: OptimizeConfig) -> bool:
    """Run in a forked process that kills itself at the given touch of the disk; false if it came to its end."""
    child = os.fork()
    if child == 0:
        count = 0

        def counting(real: Callable[..., object]) -> Callable[..., object]:
            def touching(*args: object, **named: object) -> object:
                nonlocal count
                count += 1
                if count == touch:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **named)

            return touching

        for owner, name in TOUCHES:
            setattr(owner, name, counting(getattr(owner, name)))
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
    assert list(family.variants) == ["torch-fp32", "cheap", "child"]
    assert all(variant.measured is not None for variant in family.variants.values())
    assert not list(family.directory.rglob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("again", [False, True], ids=["a new family", "a family that changes"])
def test_killed_at_every_touch_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    write_data(tmp_path / "data.jsonl", 200)
    for touch in range(1, ENOUGH):
        config = config_for(tmp_path, out=tmp_path / f"family-{touch}")
        if again:
            install(monkeypatch, FIRST_PLAN)
            run(config)
        install(monkeypatch, SECOND_PLAN)
        monkeypatch.setattr(measure, "LATENCY_SECONDS", 0.0)
        killed = killed_at(touch, config)
        check_whole(run(config))
        if not killed:
            assert touch > 20, "the run touched the disk less often than it must"
            return
    pytest.fail(f"the run did not end within {ENOUGH} touches of the disk")


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


@pytest.mark.slow
def test_the_real_command_killed_three_times(tmp_path: Path, tiny_model: Path) -> None:
    data, out = write_data(tmp_path / "data.jsonl"), tmp_path / "family"
    command = [sys.executable, "-m", "fettle.cli", "optimize", str(tiny_model), "--data", str(data), "--out", str(out)]
    command += ["--recipe", "onnx-int8-dynamic", "--max-rows", "32", "--json"]
    for moment in (first_build_under_way, export_done, first_measured):
        kill_at(moment, command, out)
    weights = out / "variants" / REFERENCE_ID / "model.safetensors"
    built = weights.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [item["id"] for item in json.loads(done.stdout)["variants"]] == [
        REFERENCE_ID,
        "onnx-fp32",
        "onnx-int8-dynamic",
    ]
    assert Family.open(out).verify() == []
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
