"""Holds one server and all that it starts: orphans come back to it, and nothing outlives it. Linux only.

    python -m benchmarks.keeper COMMAND...

A server such as Ray leaves processes behind when its first process dies. The keeper is their subreaper, so each
stays a descendant whose CPU time can be counted; at SIGTERM, at the server's own exit, or at the death of whoever
started the keeper, it ends every one. It ends nothing that it did not start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLITE_S = 15.0  # Ray takes several seconds to shut down by itself


class Stop(Exception):
    """SIGTERM arrived."""


def main() -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_CHILD_SUBREAPER, 1) or prctl(PR_SET_PDEATHSIG, signal.SIGTERM):
        raise OSError(ctypes.get_errno(), "prctl refused")
    signal.signal(signal.SIGTERM, _raise_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which sends SIGTERM
    code = 128 + signal.SIGTERM
    try:
        with contextlib.suppress(Stop):
            code = _wait_for(subprocess.Popen(sys.argv[1:], start_new_session=True).pid)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_all()
    sys.exit(code)


def _raise_stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise Stop


def _wait_for(pid: int) -> int:
    """Reap whatever dies until `pid` has; returns its exit status."""
    while True:
        dead, status = os.wait()
        if dead == pid:
            return os.waitstatus_to_exitcode(status)


def _end_all() -> None:
    """Ask the direct children first, since a server knows best how to stop its own; then kill what is left."""
    for child in psutil.Process().children():
        _send(child, signal.SIGTERM)
    deadline = time.monotonic() + POLITE_S
    while _reap() and time.monotonic() < deadline:
        time.sleep(0.05)
    while _reap():
        for descendant in psutil.Process().children(recursive=True):
            _send(descendant, signal.SIGKILL)
        time.sleep(0.05)


def _send(process: psutil.Process, signum: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # gone already, which is what was wanted
        process.send_signal(signum)


def _reap() -> bool:
    """Collect the dead; true while a child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    main()
