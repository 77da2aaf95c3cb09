"""Folders of half-made work: each is claimed by whoever makes it, and can be told from one that was abandoned.

A claim is a lock that is held on a file beside the folder, ``NAME.lock``. The system lets go of it when the holder
ends, however it ends, on this machine or on another one that shares the disk. A process id would say neither: ids are
given anew, and every machine has its own.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_SUFFIX = ".lock"
ACQUIRE_SECONDS = 60.0
"""Nobody else wants a new lock, so more than this is a disk that cannot lock files."""
UNTOUCHED_SECONDS = 24 * 3600.0
"""A folder without a lock, as earlier versions made them, is abandoned if nothing in it has changed for so long."""


@contextlib.contextmanager
def claimed_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new, empty folder in ``parent`` that others leave alone; it and its lock are removed afterwards.

    The folder may be renamed away while it is claimed: then only the lock is removed.

    Args:
        parent: a folder that exists.
        prefix: what the folder's name begins with; the rest of it is random.

    Raises:
        OSError: the folder or its lock cannot be made.
    """
    from filelock import FileLock

    folder = parent / f"{prefix}{secrets.token_hex(8)}"
    lock_file = _lock_file(folder)
    lock = FileLock(lock_file)
    try:
        lock_file.touch(exist_ok=False)  # says why it cannot be made; acquiring would try again for ever
        lock.acquire(timeout=ACQUIRE_SECONDS)  # before the folder, which is never seen without it
        folder.mkdir()
        folder.chmod(0o755)  # whatever the umask: others may read what is moved from here to its place
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlink(lock_file)
        lock.release()


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders in ``parent`` whose names begin with ``prefix`` and whose makers have ended, with their locks.

    What cannot be removed, or not be judged, is left; so is everything if ``parent`` does not exist. Any number of
    processes and threads may do this at once.
    """
    with contextlib.suppress(OSError):
        for path in list(parent.iterdir()):
            if not path.name.startswith(prefix):
                continue
            with contextlib.suppress(OSError):
                if path.name.endswith(LOCK_SUFFIX):
                    _judge_lock(path)
                elif path.is_dir() and not path.is_symlink():
                    _judge_folder(path)


def _judge_folder(folder: Path) -> None:
    lock_file = _lock_file(folder)
    if lock_file.exists():
        _remove_if_free(folder, lock_file)
    elif _untouched(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _judge_lock(lock_file: Path) -> None:
    """Remove a lock that was left without a folder; a young one may be of a claim that is just being made."""
    folder = lock_file.with_name(lock_file.name.removesuffix(LOCK_SUFFIX))
    if not folder.exists() and _untouched(lock_file):
        _remove_if_free(folder, lock_file)


def _remove_if_free(folder: Path, lock_file: Path) -> None:
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():  # else the next one tries again
            _unlink(lock_file)
    finally:
        lock.release()


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{LOCK_SUFFIX}")


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _untouched(path: Path) -> bool:
    """Whether neither a file or folder nor anything in it has changed for :data:`UNTOUCHED_SECONDS`.

    The time of the last change of status counts too: a folder that was renamed keeps the time that it was written at.

    Raises:
        OSError: it cannot be looked at, or is being removed by another one.
    """
    stats = [p.lstat() for p in (path, *(path.rglob("*") if path.is_dir() else ()))]
    changed: float = max(max(s.st_mtime, s.st_ctime) for s in stats)
    return time.time() - changed > UNTOUCHED_SECONDS
