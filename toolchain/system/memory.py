"""Memory: how much is free, and giving back what is not used."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE_BYTES = 1 << 20
GROWN_BYTES = 100_000_000

_least_resident = 0
"""Since garbage was last collected."""


def free_bytes() -> int:
    """Bytes of memory that can be used without swapping; a guess of 4 GB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError):
        return 4_000_000_000


def return_large_allocations() -> None:
    """Have the C library ask the system for every large piece of memory, and give it back when it is freed.

    glibc keeps freed pieces of up to 32 MB, which is the size of activations: what is kept in fragments adds up to
    gigabytes. This holds for the whole process from then on, and cannot be undone; doing it again changes nothing. So
    only what builds or plays calls it: :func:`toolchain.build.compile.compile_recipe`,
    :func:`toolchain.build.tasks.run_task` in whatever process it runs, and :func:`toolchain.player.player.play`.
    """
    if (mallopt := _c("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def release() -> None:
    """Collect garbage and give freed memory back to the system, which the C library would keep.

    Converters leave gigabytes in cycles. Looking for them takes a third of a second once they are loaded, so nothing
    is done until the process has grown by :data:`GROWN_BYTES`.
    """
    global _least_resident
    resident = _resident_bytes()
    if resident is not None and resident < _least_resident + GROWN_BYTES:
        _least_resident = min(_least_resident, resident)
        return
    gc.collect()
    if (trim := _c("malloc_trim")) is not None:
        trim(0)
    _least_resident = _resident_bytes() or 0


def _resident_bytes() -> int | None:
    """What this process has in memory; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def peak_bytes() -> int:
    """The most memory that this process had resident at once since it was started; 0 where the system does not say."""
    try:  # what getrusage gives on Linux may be the parent's: it outlives exec
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    except ImportError:
        return 0


def _c(name: str) -> Any:
    """A function of the C library; None where it is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
