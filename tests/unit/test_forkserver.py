"""Forks instead of new interpreters: what a worker gets, what becomes of everything else, and when it all ends.

The workers here are scripts of the tests; that Ray's own work as forks is what every test of a service shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from deployments import forkserver
from tests.integration.service import command, wait_until

pytestmark = pytest.mark.skipif(not forkserver.available(), reason="workers are forked on Linux only")

# What takes long to import and a service does without. A replica of torch's imports torch itself.
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "pandas", "pyarrow", "scipy", "matplotlib", "sympy")
WORKER = """
import json, os, sys
from ray._raylet import UniqueID
print(json.dumps({
    "parent": os.getppid(),
    "arguments": sys.argv[1:],
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "id": UniqueID.from_random().hex(),
    "main": __name__,
    "modules": list(sys.modules),
}))
print("complaint", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
LONG_WORKER = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with forkserver.started(tmp_path_factory.mktemp("forks")) as script:
        yield script


def script(directory: Path, text: str) -> Path:
    path = directory / "default_worker.py"
    path.write_text(text, encoding="utf-8")
    return path


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OWN": "value"}
    return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)


def forked(python: Path, cwd: Path, *arguments: str) -> dict:
    """What a worker says of itself; its output may come after the one who asked for it has ended."""
    found = run(python, str(script(cwd, WORKER)), *arguments, cwd=cwd)
    assert (found.returncode, found.stderr) == (0, "complaint\n"), found.stderr
    return json.loads(found.stdout)


def test_a_worker_has_the_arguments_environment_directory_and_output_of_who_asked(python, tmp_path):
    found = forked(python, tmp_path, "0", "--of=it")
    assert found["arguments"] == ["0", "--of=it"]
    assert found["environment"]["OWN"] == "value"
    assert set(found["environment"]) <= {"PATH", "PYTHONPATH", "OWN", "LC_CTYPE", "PWD"}
    assert found["directory"] == str(tmp_path)
    assert found["main"] == "__main__"
    assert "forkserver.py" in " ".join(psutil.Process(found["parent"]).cmdline())


def test_a_worker_has_a_process_group_of_its_own(python, tmp_path):
    """Ray ends the group of a worker that died: in one with the others, that would be all of them."""
    worker = long_worker(python, tmp_path, {})
    assert os.getpgid(worker.pid) == worker.pid
    worker.kill()


def test_no_two_workers_draw_the_same_ids(python, tmp_path):
    assert len({forked(python, tmp_path, "0")["id"] for _ in range(3)}) == 3


def test_a_worker_has_imported_what_it_needs_and_no_library_that_serving_does_without(python, tmp_path):
    modules = forked(python, tmp_path, "0")["modules"]
    assert {"ray.serve._private.replica", "deployments.app", "deployments.variant"} <= set(modules)
    assert not set(HEAVY) & set(modules)


@pytest.mark.parametrize(
    "code", ["import deployments.server, deployments.welcome, deployments.app", "import fettle.cli"]
)
def test_the_command_imports_no_library_that_serving_does_without(code):
    names = json.loads(_python("-c", f"{code}; import json, sys; print(json.dumps(list(sys.modules)))"))
    assert not set(HEAVY) & set(names)


def test_a_replica_of_a_graph_imports_its_runtime_and_nothing_of_torch():
    names = json.loads(
        _python(
            "-c", "import deployments.variant, workers.onnx_encoder, json, sys; print(json.dumps(list(sys.modules)))"
        )
    )
    assert "onnxruntime" in names
    assert not set(HEAVY) - {"onnxruntime"} & set(names)


def test_whatever_is_no_worker_is_run_by_python(python, tmp_path):
    found = run(python, "-c", "import os, sys; print(sys.executable, os.environ['OWN'])", cwd=tmp_path)
    assert found.stdout.split() == [sys.executable, "value"]


def test_what_is_left_out_lives_and_does_nothing(tmp_path):
    with forkserver.started(tmp_path, modules=["json"], without=["log_monitor.py"]) as python:
        with subprocess.Popen([python, "-u", "/of/ray/log_monitor.py", "--session"]) as left_out:
            assert wait_until(lambda: command(psutil.Process(left_out.pid)) == "sleep infinity", 30)
            left_out.kill()
        assert run(python, "-c", "print('log_monitor.py')", cwd=tmp_path).stdout == "log_monitor.py\n"


def test_python_may_be_anywhere(tmp_path):
    place = tmp_path / "it's \\ a $HOME of Python" / ("deep" * 30)
    place.mkdir(parents=True)
    (place / "python").symlink_to(Path(sys.executable).resolve())
    forkserver.write_stand_in(tmp_path / "python", str(place / "python"), tmp_path / "nobody.sock")
    found = run(tmp_path / "python", "-c", "import sys; print(sys.argv[1:])", "a b", "$HOME", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (0, "['a b', '$HOME']\n"), found.stderr


def test_without_a_server_workers_are_run_by_python(tmp_path):
    with forkserver.started(tmp_path, modules=["json"]) as python:
        pass
    found = run(python, str(script(tmp_path, "import os, sys; print(os.getpid()); sys.exit(3)")), cwd=tmp_path)
    assert found.returncode == 3


def test_what_is_no_request_ends_nothing(python, tmp_path):
    import socket

    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(python.with_name("forks.sock")))
        client.sendall(b"nonsense\n")
    assert forked(python, tmp_path, "0")["arguments"] == ["0"]


def test_workers_end_with_the_raylet_that_asked_for_them(tmp_path):
    with ExitStack() as stack:
        python = stack.enter_context(forkserver.started(tmp_path, modules=["json"]))
        raylet = stack.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        worker = long_worker(python, tmp_path, {forkserver.RAYLET_PID: str(raylet.pid)})
        server = worker.parent()
        raylet.kill()
        assert wait_until(lambda: not lives(worker), 30)
        assert wait_until(lambda: not lives(server), 30)


def test_workers_end_with_the_server_and_the_server_with_who_started_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from deployments import forkserver\n"
        f"with forkserver.started(Path({str(tmp_path)!r}), modules=['json']): print('up', flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "up\n"
        worker = long_worker(tmp_path / "python", tmp_path, {})
        server = worker.parent()
        starter.kill()
        assert wait_until(lambda: not lives(worker), 30)
        assert wait_until(lambda: not lives(server), 30)


def long_worker(python: Path, directory: Path, environment: dict[str, str]) -> psutil.Process:
    command = [python, str(script(directory, LONG_WORKER))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as asking:
        assert asking.stdout is not None
        worker = psutil.Process(int(asking.stdout.readline()))
        if worker.pid == asking.pid:
            asking.kill()
            pytest.fail("it was no fork")
    assert lives(worker)
    return worker


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout
