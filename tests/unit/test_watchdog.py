"""A process whose engine hangs ends itself, and says where it was; one whose engine works goes on."""

from __future__ import annotations

import subprocess
import sys

from deployments.watchdog import STUCK_STATUS

LIMIT_S = 0.4
PROGRAM = """
import time
from deployments.watchdog import Watchdog

def stuck():
    {hang}

watchdog = Watchdog({limit})
watchdog.start()
for _ in range({calls}):
    with watchdog.watching():
        time.sleep(0.05)
time.sleep(2 * {limit})
with watchdog.watching():
    stuck()
print("went on", flush=True)
"""


def run(hang: str, calls: int = 0) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(hang=hang, limit=LIMIT_S, calls=calls)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_many_short_calls_and_idle_time_are_no_long_one():
    done = run("pass", calls=3 * round(LIMIT_S / 0.05))
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_an_endless_loop_ends_the_process():
    done = run("\n    while True: pass")
    assert done.returncode == STUCK_STATUS
    assert "the engine is stuck" in done.stderr
    assert "in stuck" in done.stderr
    assert "went on" not in done.stdout


def test_a_call_that_lets_no_thread_have_its_turn_ends_the_process():
    # PyDLL keeps the interpreter's lock while the foreign function runs.
    done = run("import ctypes; ctypes.PyDLL(None).sleep(60)")
    assert done.returncode == 1
    assert "in stuck" in done.stderr
