"""Full disks, and sizes for people."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

FULL_BYTES = 1_000_000
"""A disk with less room than this is full."""
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def full_disk_named(*folders: Path, next_bytes: int = 0) -> Iterator[None]:
    """Raise what fails in the body because a disk is full as what it is.

    Converters have many ways to say so, and wrap it in errors of their own. Use it inside of whatever removes their
    files, for with them gone the disk is full no more.

    Args:
        folders: what the body writes to; the folder of temporary files is looked at as well.
        next_bytes: the most that the body writes at once: a disk with less room is full for it, though some is left.

    Raises:
        OSError: ``ENOSPC``.
    """
    try:
        yield
    except Exception as e:
        written = (*folders, Path(tempfile.gettempdir()))
        if not isinstance(e, OSError) and (_says_full(e) or _full(*written, room=max(FULL_BYTES, next_bytes))):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
        raise


def _says_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error of another kind."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _full(*folders: Path, room: int) -> bool:
    return min(shutil.disk_usage(folder).free for folder in folders) < room


def readable_size(count: float) -> str:
    """Bytes for people: ``85.1 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
