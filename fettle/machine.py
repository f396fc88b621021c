"""What this process may use of the machine that it runs on."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that the scheduler lets this process run on, which containers and `taskset` make fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
