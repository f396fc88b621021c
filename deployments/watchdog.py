"""Ends a replica's process when its engine hangs: what is under way there is then lost at once, and done elsewhere.

A thread looks how long the engine has been at it; where the engine lets no thread have its turn, faulthandler's own
timer, which needs none, does the same. Either way the replica's log says where every thread was. Serve alone would not
notice: its health checks are answered by another thread than the engine's.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# The exit status of a process that was ended here.
STUCK_STATUS = 71
STDERR = 2
LOOK_EVERY_S = 1.0


class Watchdog:
    """One for the process; `start` before the first call. `limit_s`: no call of the engine takes so long."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._since: float | None = None
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a call of the engine; one at a time."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _look(self) -> None:
        pause_s = min(LOOK_EVERY_S, self.limit_s / 4)
        while True:
            # Set again before it fires, as long as this thread has its turns.
            faulthandler.dump_traceback_later(self.limit_s + pause_s, exit=True, file=STDERR)
            time.sleep(pause_s)
            since = self._since
            if since is not None and time.monotonic() - since > self.limit_s:
                os.write(STDERR, f"the engine is stuck for {self.limit_s:g} s; this replica ends\n".encode())
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                os._exit(STUCK_STATUS)
