"""Large pages: which memory is moved, and that it holds what it held."""

from __future__ import annotations

import numpy as np

from workers.huge_pages import PAGE, _ranges, use_huge_pages

START = 0x7F0000000000


def mapping(pages: float, resident: float, flags: str = "rw-p", path: str = "", inode: int = 0) -> str:
    """As /proc/self/smaps has it, from `START` on."""
    end = START + int(pages * PAGE)
    head = f"{START:x}-{end:x} {flags} 00000000 00:00 {inode} {path}".rstrip() + " " * (not path)
    size, used = int(pages * PAGE) >> 10, int(pages * PAGE * resident) >> 10
    return f"{head}\nSize:           {size} kB\nRss:            {used} kB\nVmFlags: rd wr mr mw me ac sd\n"


def test_private_memory_in_use_is_moved():
    for path in ("", "[heap]"):
        assert list(_ranges(mapping(3.5, 0.6, path=path))) == [(START, START + 3 * PAGE)]


def test_other_memory_stays():
    kept = [
        mapping(3, 0.4),
        mapping(0.9, 1),
        mapping(3, 1, flags="r--p"),
        mapping(3, 1, flags="rw-s"),
        mapping(3, 1, path="[stack]"),
        mapping(3, 1, path="/usr/lib/libc.so.6", inode=42),
        mapping(3, 1, path="/a file - with spaces", inode=42),
    ]
    assert list(_ranges("".join(kept))) == []
    assert list(_ranges(kept[-1] + mapping(1, 1) + kept[0])) == [(START, START + PAGE)]


def test_start_within_a_page_is_rounded_up():
    text = mapping(3, 1).replace(f"{START:x}-", f"{START + 4096:x}-", 1)
    assert list(_ranges(text)) == [(START + PAGE, START + 3 * PAGE)]


def test_memory_holds_what_it_held():
    values = np.random.default_rng(0).integers(0, 255, 8 * PAGE, np.uint8)
    before = values.copy()
    assert use_huge_pages() >= 0
    assert np.array_equal(values, before)
