"""The command as a user meets it: what it prints where, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fettle import __version__
from fettle.cli import app
from fettle.store import locked
from optimize import pipeline
from tests.fake_optimize import REFERENCE, fake_recipe, install, write_data
from tests.fakes import FakeVariant, change_json, embed_task, make_fake_family

MINE = ("optimize", "show", "verify")


def fettle(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    """What a failure says: exactly one line, on standard error."""
    (line,) = result.stderr.strip().splitlines()
    assert result.stdout == ""
    return line


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_fake_family(
        tmp_path / "family",
        variants=[
            FakeVariant("original", ms_per_token=0.1),
            FakeVariant("cheap", ms_per_token=0.05, disagreement=0.021, invariant=False),
        ],
    )
    return tmp_path / "family"


# All commands


def test_help_names_every_command() -> None:
    shown = fettle("--help")
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in MINE)


@pytest.mark.parametrize("command", MINE)
def test_every_command_has_help_with_an_example(command: str) -> None:
    shown = fettle(command, "--help")
    assert shown.exit_code == 0
    assert f"fettle {command}" in shown.stdout.partition("Example")[2]


def test_version() -> None:
    assert fettle("--version").stdout.strip() == f"fettle {__version__}"


@pytest.mark.parametrize("arguments", [["polish"], ["show"], ["show", "a", "--colour", "red"], ["optimize", "m"]])
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    assert fettle(*arguments).exit_code == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fettle.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'numpy', 'pydantic', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_serve_sets_the_environment_before_it_imports_ray(directory: Path) -> None:
    """Ray reads what it is told when it is imported; too late, and every call goes the slow way."""
    code = (
        "import sys, contextlib, deployments.server\n"
        "@contextlib.contextmanager\n"
        "def running(config, options):\n    print('ray' in sys.modules)\n    yield sys.exit()\n"
        "deployments.server.running = running\n"
        f"from fettle.cli import app\napp(['serve', {str(directory)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# show


def test_show_prints_a_table(directory: Path) -> None:
    shown = fettle("show", directory)
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line.split()}
    assert "100.00%" in lines["original*"]
    assert "yes" in lines["original*"]
    assert "97.90%" in lines["cheap"]
    assert "no, 0.0%" in lines["cheap"]
    assert "1.6" in lines["original*"]


def test_show_fits_into_eighty_columns(directory: Path) -> None:
    table = fettle("show", directory).stdout.partition("*  answers")[0]
    assert "…" not in table


def test_show_for_machines(directory: Path) -> None:
    shown = json.loads(fettle("show", directory, "--json").stdout)
    assert shown["default"] == shown["reference"] == "original"
    original, cheap = shown["variants"]
    assert original["same_answers"] == 1.0
    assert cheap["same_answers"] == pytest.approx(0.979)
    assert cheap["batch_invariant"] is False
    assert original["ms_at_batch_1"] == pytest.approx(1.6)
    assert original["best_rows_per_second"] == pytest.approx(625)


def test_show_lists_what_was_not_built(directory: Path) -> None:
    reason = "needs a [CUDA] device"
    change_json(directory / "family.json", not_built=[{"id": "tensorrt", "reason": reason}])
    assert f"not built: tensorrt: {reason}" in fettle("show", directory).stdout
    assert json.loads(fettle("show", directory, "--json").stdout)["not_built"][0]["reason"] == reason


def test_show_of_vectors(tmp_path: Path) -> None:
    make_fake_family(tmp_path / "f", task=embed_task(8))
    assert "vectors of 8" in fettle("show", tmp_path / "f").stdout


def test_show_of_no_family_is_one_clear_line(tmp_path: Path) -> None:
    shown = fettle("show", tmp_path)
    assert shown.exit_code == 1
    assert one_line(shown).startswith(f"error: {tmp_path} is not a family")


# verify


def test_verify_an_intact_family(directory: Path) -> None:
    shown = fettle("verify", directory)
    assert (shown.exit_code, shown.stdout.strip()) == (0, f"{directory}: intact")
    assert json.loads(fettle("verify", directory, "--json").stdout) == {"intact": True, "problems": []}


def test_verify_names_each_damaged_file_and_the_remedy(directory: Path) -> None:
    one, two = (directory / "variants" / name / "weights.bin" for name in ("original", "cheap"))
    one.write_bytes(b"X" + one.read_bytes()[1:])
    two.unlink()
    shown = fettle("verify", directory)
    assert shown.exit_code == 1
    lines = shown.stderr.strip().splitlines()
    assert len(lines) == 2
    assert str(one) in lines[0]
    assert str(two) in lines[1]
    assert all("fettle optimize" in line for line in lines)


def test_verify_for_machines_says_so_and_still_fails(directory: Path) -> None:
    change_json(directory / "variants" / "cheap" / "manifest.json", precision="bf16")
    shown = fettle("verify", directory, "--json")
    assert shown.exit_code == 1
    found = json.loads(shown.stdout)
    assert found["intact"] is False
    assert "manifest.json" in found["problems"][0]


@pytest.mark.parametrize(("key", "value"), [("schema_version", 7), ("stranger", 1)])
def test_verify_refuses_what_it_does_not_understand(directory: Path, key: str, value: int) -> None:
    change_json(directory / "family.json", **{key: value})
    shown = fettle("verify", directory)
    assert shown.exit_code == 1
    assert str(directory / "family.json") in one_line(shown)


# optimize


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(monkeypatch, [REFERENCE, fake_recipe("cheap")])
    return write_data(tmp_path / "data.jsonl")


def test_optimize_makes_a_family_and_shows_it(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    done = fettle("optimize", "org/colours", "--data", data, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "colours: single label, 3 outputs" in done.stdout
    assert "accuracy" in done.stdout
    assert f"fettle serve {out}" in done.stderr
    assert fettle("verify", out).exit_code == 0


def test_optimize_for_machines_prints_one_object_only(tmp_path: Path, data: Path) -> None:
    done = fettle("optimize", "m", "--data", data, "--out", tmp_path / "out", "--name", "n", "--json")
    shown = json.loads(done.stdout)
    assert shown["name"] == "n"
    assert [item["id"] for item in shown["variants"]] == ["torch-fp32", "cheap"]
    assert "measure cheap" in done.stderr


def test_optimize_passes_its_options_on(tmp_path: Path, data: Path) -> None:
    content = data.read_text().replace('"text"', '"words"').replace('"label"', '"colour"')
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(content)
    files = [argument for name in ("train", "test") for argument in (f"--{name}", tmp_path / f"{name}.jsonl")]
    done = fettle(
        *("optimize", "m", *files, "--out", tmp_path / "out", "--text-column", "words", "--label-column", "colour"),
        *("--recipe", "torch-fp32", "--threads", 2, "--max-rows", 30, "--seed", 3, "--task", "classify", "--json"),
    )
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [item["id"] for item in shown["variants"]] == ["torch-fp32"]
    assert (shown["variants"][0]["threads"], shown["variants"][0]["rows"]) == (2, 30)
    assert (shown["data"]["test"]["rows"], shown["data"]["train"]["rows"]) == (400, 0)
    assert "400 from train" in done.stderr


@pytest.mark.parametrize(
    ("options", "says", "status"),
    [
        ([], "either data, or some of train", 2),
        (["--data", "d", "--test", "t"], "either data, or some of train", 2),
        (["--train", "d"], "test is missing", 2),
        (["--data", "d", "--max-rows", "1"], "max_rows", 2),
        (["--data", "d", "--task", "paint"], "task", 2),
        (["--data", "d", "--name", "a/b"], "name", 2),
        (["--data", "absent.jsonl"], "absent.jsonl: no such file", 1),
        (["--data", "notes.txt"], "unknown kind of file", 1),
    ],
)
def test_optimize_refuses_in_one_clear_line(tmp_path: Path, data: Path, options: list[str], says: str, status: int):
    done = fettle("optimize", "m", "--out", tmp_path / "out", *options)
    assert done.exit_code == status
    assert says in one_line(done)
    assert one_line(done).startswith("error: ")


def test_optimize_in_a_directory_in_use(tmp_path: Path, data: Path) -> None:
    with locked(tmp_path / "out"):
        done = fettle("optimize", "m", "--data", data, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "another fettle run" in one_line(done)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_clear_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    done = fettle("optimize", "m", "--data", data, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert one_line(done) == f"error: {tmp_path / 'out'}: {os.strerror(number)}"


def test_an_output_that_is_a_file_is_one_clear_line(tmp_path: Path, data: Path) -> None:
    done = fettle("optimize", "m", "--data", data, "--out", data)
    assert done.exit_code == 1
    assert str(data) in one_line(done)


def test_an_interrupt_exits_with_130(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_reference", interrupt)
    done = fettle("optimize", "m", "--data", data, "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "error: interrupted; the same command goes on from here"


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    """While the data are read, which a pipe that never ends makes last."""
    os.mkfifo(tmp_path / "data.jsonl")
    (tmp_path / "m").mkdir()
    config = '{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}'
    (tmp_path / "m/config.json").write_text(config)
    command = ["optimize", str(tmp_path / "m"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fettle.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore it, and what they start with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # Opening for writing waits for the reader.
        writer = os.open(tmp_path / "data.jsonl", os.O_WRONLY)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(writer)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors.splitlines()[-1]
