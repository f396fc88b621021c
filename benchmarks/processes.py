"""A server under test as one thing: start it, wait until it answers, read its CPU time, stop all of it.

Knows no system in particular, and sends no load.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

# How the title of each of Ray's processes begins that is a router, a replica or the monitor.
REPLICA = "ray::ServeReplica:fettle:"
STOP_S = 40.0  # more than the keeper's own patience


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to start a server and how to tell that it answers.

    `probe` is a whole JSON body that is posted to `url`, with `headers`, until the reply is a 200; None: `url` is got.
    `environment` is added to ours.
    """

    command: Sequence[str]
    url: str
    probe: bytes | None
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    start_s: float = 180.0
    headers: Mapping[str, str] = field(default_factory=dict)
    look_every_s: float = 0.5


class Server:
    """A context manager around one running server; its output goes to `log`."""

    def __init__(self, spec: ServerSpec, log: Path) -> None:
        self._spec = spec
        self._log = log
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it died, or did not answer in time; the end of its log is in the message.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.keeper", *self._spec.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": _python_path(), **self._spec.environment},
                cwd=self._spec.directory,
            )
        try:
            self._wait_until_ready(self._keeper)
        except BaseException:  # Ctrl-C among them: nobody calls `__exit__` of what was not entered
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def cpu_seconds(self) -> float:
        """User and system seconds so far of every process of the server, those that have ended included."""
        if self._keeper is None:
            raise RuntimeError("cpu_seconds() of a server that is not running")
        keeper = psutil.Process(self._keeper.pid)
        return sum(map(_spent, [keeper, *keeper.children(recursive=True)]))

    @property
    def first(self) -> psutil.Process:
        """The process that the command began."""
        if self._keeper is None:
            raise RuntimeError("first of a server that is not running")
        return min(psutil.Process(self._keeper.pid).children(), key=psutil.Process.create_time)

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of the server whose command line begins with `title`, as Ray's do with what they are."""
        if self._keeper is None:
            raise RuntimeError("processes() of a server that is not running")
        return [p for p in psutil.Process(self._keeper.pid).children(recursive=True) if title_of(p).startswith(title)]

    def _wait_until_ready(self, keeper: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._spec.start_s
        while time.monotonic() < deadline:
            if keeper.poll() is not None:
                raise RuntimeError(f"the server ended with status {keeper.returncode}:\n{self._tail()}")
            if _answers(self._spec):
                return
            time.sleep(self._spec.look_every_s)
        raise RuntimeError(f"no answer from {self._spec.url} in {self._spec.start_s:g} s:\n{self._tail()}")

    def _stop(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        keeper.terminate()
        try:
            keeper.wait(STOP_S)
        except subprocess.TimeoutExpired:
            _kill_tree(keeper)

    def _tail(self, characters: int = 3000) -> str:
        return self._log.read_text(errors="replace")[-characters:]


def _python_path() -> str:
    """Where the keeper finds this package, whatever directory the server runs in."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))


def _answers(spec: ServerSpec) -> bool:
    headers = {"Content-Type": "application/json", **spec.headers}
    request = urllib.request.Request(spec.url, spec.probe, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _spent(process: psutil.Process) -> float:
    """Of one process and of the children that it has reaped."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0  # it ended since we listed it; its parent's children_* hold it
    return float(times.user + times.system + times.children_user + times.children_system)


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill_tree(keeper: subprocess.Popen[bytes]) -> None:
    for process in psutil.Process(keeper.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    keeper.kill()
    keeper.wait()
