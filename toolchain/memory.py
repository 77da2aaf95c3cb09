"""Memory: how much is free, and giving back what is not used."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path


def free_bytes() -> int:
    """Bytes of memory that can be used without swapping; a guess of 4 GB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError):
        return 4_000_000_000


def release() -> None:
    """Give freed memory back to the system, which the C library would keep: converters free gigabytes."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries do not
        if trim is not None:
            trim(0)
