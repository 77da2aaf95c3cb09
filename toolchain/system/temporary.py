"""Where Python's temporary files go. There is one such place in a process."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

_changed = threading.Condition()
_users = 0
"""How many are in :func:`temporary_files_in`, of whatever threads; guarded by ``_changed``."""


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Have every temporary file made in ``folder``: converters leave large ones behind, which go with the folder.

    This holds for the whole process, since :data:`tempfile.tempdir` does. So whoever comes first decides: while the
    body runs, whoever else comes, inside it or in another thread, has the same folder, whatever they ask for; and who
    came first waits at the end until they have left, so that the folder can be removed under nobody's feet.

    Args:
        folder: exists, and stays until the body ends.
    """
    global _users
    with _changed:
        first = _users == 0
        usual = tempfile.tempdir
        if first:
            tempfile.tempdir = str(folder)
        _users += 1
    try:
        yield
    finally:
        with _changed:
            _users -= 1
            _changed.notify_all()
            if first:
                try:
                    _changed.wait_for(lambda: _users == 0)
                finally:  # also when a signal ends the waiting
                    tempfile.tempdir = usual
