"""Ray's worker processes as forks of one process that has imported what they need. Linux only.

A worker as Ray starts it imports Ray, Serve and the application, one to two seconds of a core, each anew. Ray starts
workers with `sys.executable`, so while it is started that is a script of ours (`STAND_IN`): it has the server fork what
is a worker, with the script's own arguments, environment and files, and becomes Python itself for all else, and for
workers too where the server does not answer. The server has no threads when it forks. It ends, with its forks, when
the raylet that asked for them does, or whoever started it.

Run as a file; `started` does that.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PR_SET_PDEATHSIG = 1
ANSWER_WITHIN_S = 20.0
END_WITHIN_S = 10.0
LONGEST_REQUEST = 1 << 20
RAYLET_PID = "RAY_RAYLET_PID"
# What workers of Serve import, and those of Fettle.
MODULES = (
    "ray._private.workers.default_worker",
    "ray.serve._private.controller",
    "ray.serve._private.haproxy",
    "ray.serve._private.proxy",
    "ray.serve._private.replica",
    "deployments.app",
)
# The standard library alone, and little of it: every worker's start goes through here. Its first lines are a command
# for a shell and a string for Python, since what stands after #! can neither be long nor have spaces.
STAND_IN = """\
#!/bin/sh
'''exec' {quoted} -IS "$0" "$@"
' '''
import os, sys
arguments = sys.argv[1:]
if any(argument.endswith({without!r}) for argument in arguments[:2]):
    os.execvp("sleep", ["sleep", "infinity"])
if arguments and arguments[0].endswith("default_worker.py"):
    try:
        import json, socket
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout({seconds})
            server.connect({address!r})
            asked = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
            socket.send_fds(server, [b"%d\\n" % len(asked)], [0, 1, 2])
            server.sendall(asked)
            if server.recv(16):
                sys.exit(0)
    except OSError:
        pass
os.execv({python!r}, [{python!r}, *arguments])
"""


def available() -> bool:
    """Whether this system has what it takes; macOS breaks what was forked."""
    return sys.platform == "linux"


@contextmanager
def started(directory: Path, modules: Sequence[str] = MODULES, without: Sequence[str] = ()) -> Iterator[Path]:
    """A server with these modules, for the Ray that is started meanwhile; yields the stand-in for Python.

    `without`: scripts that are not run; who starts one finds that it lives.
    """
    address, script, own = directory / "forks.sock", directory / "python", Path(__file__).resolve()
    write_stand_in(script, sys.executable, address, without)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        command = [sys.executable, "-P", str(own), str(listener.fileno()), str(own.parent.parent), *modules]
        # Numpy starts threads when it is imported, unless it is told not to; workers have an environment of their own.
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], start_new_session=True, env=alone)
    try:
        yield script
    finally:
        server.terminate()
        try:
            server.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def write_stand_in(script: Path, python: str, address: Path, without: Sequence[str] = ()) -> None:
    """The script that Ray starts in the place of `python`; the server listens at `address`."""
    values = {"python": python, "quoted": shlex.quote(python), "seconds": ANSWER_WITHIN_S, "address": str(address)}
    script.write_text(STAND_IN.format(**values, without=tuple(without)), encoding="utf-8")
    script.chmod(0o700)


@contextmanager
def standing_in(script: Path) -> Iterator[None]:
    """Ray starts its Python processes with this, for as long as the Ray lives that is started meanwhile."""
    python, sys.executable = sys.executable, str(script)
    try:
        yield
    finally:
        sys.executable = python


@dataclass(frozen=True, slots=True)
class Worker:
    """One that is to start. `files` are to be its standard input, output and error."""

    arguments: list[str]
    environment: dict[str, str]
    directory: str
    files: list[int]

    @classmethod
    def asked_by(cls, client: socket.socket) -> Worker:
        """Raises OSError, ValueError: what comes is no request."""
        begin, files, _, _ = socket.recv_fds(client, 65536, 3)
        size, _, body = begin.partition(b"\n")
        if not 0 < int(size) <= LONGEST_REQUEST or len(files) != 3:
            raise ValueError("no request for a worker")
        while len(body) < int(size):
            piece = client.recv(65536)
            if not piece:
                raise ValueError("a request that ends too early")
            body += piece
        arguments, environment, directory = json.loads(body)
        return cls(arguments, environment, directory, files)

    def become(self) -> None:
        """Run what was asked for, as its own process."""
        from ray._raylet import Config  # type: ignore[attr-defined]

        for number, file in enumerate(self.files):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        # All else it reads again.
        Config.initialize("")
        np.random.seed()
        sys.argv = self.arguments
        sys.path.insert(0, str(Path(self.arguments[0]).parent))
        runpy.run_path(self.arguments[0], run_name="__main__")


@dataclass(slots=True)
class Forks:
    """The server: forks for whoever asks, and ends its forks when it ends."""

    listener: socket.socket
    children: set[int] = field(default_factory=set)
    raylet: int | None = None
    ended: bool = False

    def next_worker(self) -> Worker | None:
        """In a fork, what it is to be; None when the server has ended."""
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._end)
        while not self.ended:
            watched = [self.listener.fileno(), wake, *([] if self.raylet is None else [self.raylet])]
            ready, _, _ = select.select(watched, [], [])
            if self.raylet in ready:
                break
            if wake in ready:
                os.read(wake, 4096)
                self._reap()
            if self.listener.fileno() in ready and (worker := self._serve()) is not None:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                for file in (wake, woken, self.listener.detach(), self.raylet):
                    if file is not None:
                        os.close(file)
                return worker
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return None

    def _serve(self) -> Worker | None:
        """Fork for one client; in the fork, what it asked for."""
        client, _ = self.listener.accept()
        with client:
            client.settimeout(ANSWER_WITHIN_S)
            try:
                worker = Worker.asked_by(client)
            except (OSError, ValueError) as error:
                sys.stderr.write(f"fettle: forkserver: {error}\n")
                return None
            if self.raylet is None and RAYLET_PID in worker.environment:
                self.raylet = os.pidfd_open(int(worker.environment[RAYLET_PID]))
            child = os.fork()
            if not child:
                # Ray ends the group of a worker that died.
                os.setpgid(0, 0)
                return worker
            self.children.add(child)
            for file in worker.files:
                os.close(file)
            try:
                client.sendall(b"%d" % child)
            except OSError:
                # Whoever asked has given up, and starts one without us.
                os.kill(child, signal.SIGKILL)
        return None

    def _reap(self) -> None:
        while self.children:
            child, _ = os.waitpid(-1, os.WNOHANG)
            if not child:
                return
            self.children.discard(child)

    def _end(self, *_: object) -> None:
        self.ended = True


def main() -> None:
    """`forkserver.py FILE ROOT MODULE...`: FILE is the number of the socket to listen on."""
    number, root, *modules = sys.argv[1:]
    listener = socket.socket(fileno=int(number))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    sys.path.append(root)
    # What Ray reads only when it is imported: workers are of no job until they have work, as those are that Ray starts
    # ahead, and end with whoever started this.
    os.environ |= {"RAY_JOB_ID": "ffffffff", RAYLET_PID: str(os.getppid())}
    load(modules)
    # What all forks share is nothing to be collected, which would copy it.
    gc.collect()
    gc.freeze()
    # Should a module start threads, or Ray come to draw ids in another way, workers start as Ray starts them.
    alone = len(list(Path("/proc/self/task").iterdir())) == 1
    worker = Forks(listener).next_worker() if alone and draw_apart() else None
    if worker is not None:
        worker.become()


def load(modules: Sequence[str]) -> None:
    """Import them, and draw no id from Ray's generator: the first one seeds it, for all forks alike."""
    import ray.actor

    drawn = ray.actor.ActorClassID
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: drawn(os.urandom(drawn.size())))
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        ray.actor.ActorClassID = drawn


def draw_apart() -> bool:
    """Whether two forks draw different ids, as they must."""
    from ray._raylet import UniqueID

    read, write = os.pipe()
    for _ in range(2):
        child = os.fork()
        if not child:
            os.write(write, UniqueID.from_random().binary())
            os._exit(0)
        os.waitpid(child, 0)
    first, second = os.read(read, UniqueID.size()), os.read(read, UniqueID.size())
    os.close(read)
    os.close(write)
    return first != second


if __name__ == "__main__":
    main()
