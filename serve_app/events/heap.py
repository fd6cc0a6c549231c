"""glibc's heap in a publisher: what is freed goes back to the system.

A publisher's tables grow and shrink by megabytes. glibc takes such pieces from the system one by one, until it has
freed some. Then it raises its threshold, takes the next ones from the heap, and what outlives them keeps the heap's top
in place. Measured with caches that are reset again and again: 61 MB at most, 56 with this (docs/benchmarks.md, "Soak").
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Final

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_BYTES: Final = 128 * 1024


def give_back() -> None:
    """Once, at the start of the process. Where there is no glibc nothing changes."""
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is not None:
        for option, value in ((_M_MMAP_THRESHOLD, _BYTES), (_M_TRIM_THRESHOLD, _BYTES), (_M_ARENA_MAX, 1)):
            mallopt(option, value)
