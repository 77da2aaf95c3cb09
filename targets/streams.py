"""Keeping converters and runtimes quiet, and reading what they said when they fail."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

_one_at_a_time = threading.RLock()
_said: BinaryIO | None = None
"""Where the streams lead while they are redirected; guarded by ``_one_at_a_time``."""


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Silence converters: progress bars of their own, remarks on versions, missing accelerators and the CPU.

    They write to the process's streams from Python and from C++, so the streams themselves are redirected: file
    descriptors 1 and 2, ``sys.stdout``, ``sys.stderr``, warnings and logging, for every thread of the process until
    the body ends. What they raise is not touched. A second thread waits for its turn, which also keeps converters,
    that are not thread-safe, apart; inside of itself it redirects once.

    Yields:
        A function that returns what was said since the body began; of use until the body ends.
    """
    with _one_at_a_time:
        if _said is None:
            with _redirected() as said:
                yield _reader(said)
        else:
            yield _reader(_said)


def _reader(said: BinaryIO) -> Callable[[], str]:
    sys.stdout.flush()
    start = said.seek(0, os.SEEK_END)

    def read() -> str:
        sys.stdout.flush()
        said.seek(start)
        return said.read().decode(errors="replace")  # and at its end again, where the streams go on

    return read


@contextlib.contextmanager
def _redirected() -> Iterator[BinaryIO]:
    """The file that the process's streams lead to."""
    global _said
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryFile() as said, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for stream, _ in kept:
                os.dup2(said.fileno(), stream)
            # in notebooks and under pytest, Python's streams are not the process's
            with (
                os.fdopen(os.dup(said.fileno()), "w") as text,
                contextlib.redirect_stdout(text),
                contextlib.redirect_stderr(text),
            ):
                _said = said
                yield said
    finally:
        _said = None
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        logging.disable(before)
