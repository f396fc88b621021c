"""A process's memory on pages of 2 MB instead of 4 kB, where Linux allows it.

A decoder reads all of its weights for every token; on small pages a good part of that time goes into finding where they
are (benchmarks/LOG.md, "huge pages"). ONNX Runtime takes its memory from malloc, which does not ask for large pages.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = 2 << 20
MAPS = Path("/proc/self/smaps")
# Of linux/mman.h: at once (Linux 6.1), or in the background when the kernel comes by.
AT_ONCE, LATER = 25, 14
HEAD = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[heap\])?$")
RESIDENT = re.compile(r"Rss: +(?P<kilobytes>\d+) kB$")


def use_huge_pages() -> int:
    """Move what this process has in memory now to large pages, where it lies together; about a second for a gigabyte.

    Files, and reserved memory that is mostly unused, stay as they are. Where the system has no such pages, nothing
    happens. Returns the bytes that were moved, or will be.
    """
    if not MAPS.exists():
        return 0  # no Linux
    advise = ctypes.CDLL(None, use_errno=True).madvise
    moved = 0
    for start, end in _ranges(MAPS.read_text()):
        where = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        if advise(*where, AT_ONCE) == 0 or advise(*where, LATER) == 0:
            moved += end - start
    return moved


def _ranges(maps: str) -> Iterator[tuple[int, int]]:
    """Whole large pages of private memory that is at least half in use."""
    head: re.Match[str] | None = None
    for line in maps.splitlines():
        found = HEAD.match(line)
        if found is not None or "-" in line.split(" ", 1)[0]:
            head = found
            continue
        resident = RESIDENT.match(line)
        if resident is None or head is None:
            continue
        start, end = int(head["start"], 16), int(head["end"], 16)
        if 2 * 1024 * int(resident["kilobytes"]) >= end - start:
            start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
            if start < end:
                yield start, end
