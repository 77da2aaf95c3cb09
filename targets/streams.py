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
_state = threading.Lock()
"""Guards what follows."""
_bodies = 0
"""How many bodies of :func:`quiet` there are; the streams are redirected while there are any."""
_said: BinaryIO
"""Where the streams lead meanwhile."""
_redirection = contextlib.ExitStack()


@contextlib.contextmanager
def quiet(*, alone: bool = True) -> Iterator[Callable[[], str]]:
    """Silence converters: progress bars of their own, remarks on versions, missing accelerators and the CPU.

    They write to the process's streams from Python and from C++, so the streams themselves are redirected: file
    descriptors 1 and 2, ``sys.stdout``, ``sys.stderr``, warnings and logging, for every thread of the process until
    the body ends. What they raise is not touched. A second thread waits for its turn, which also keeps converters,
    that are not thread-safe, apart; inside of itself it redirects once.

    Args:
        alone: False for what may go on beside others that say so, such as loading a program while another runs; what
            was said is then what all of them said.

    Yields:
        A function that returns what was said since the body began; of use until the body ends.
    """
    with _one_at_a_time if alone else contextlib.nullcontext():
        said = _enter()
        try:
            yield _reader(said)
        finally:
            _leave()


def _enter() -> BinaryIO:
    """Redirect the streams unless they are; returns the file that they lead to."""
    global _bodies, _said
    with _state:
        if _bodies == 0:
            _said = _redirection.enter_context(_redirected())
        _bodies += 1
        return _said


def _leave() -> None:
    global _bodies
    with _state:
        _bodies -= 1
        if _bodies == 0:
            _redirection.close()


def _reader(said: BinaryIO) -> Callable[[], str]:
    sys.stdout.flush()
    start = os.fstat(said.fileno()).st_size

    def read() -> str:
        sys.stdout.flush()
        size = os.fstat(said.fileno()).st_size
        return os.pread(said.fileno(), size - start, start).decode(errors="replace")

    return read


@contextlib.contextmanager
def _redirected() -> Iterator[BinaryIO]:
    """The file that the process's streams lead to; whoever writes to it does so at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryFile("a+b") as said, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for stream, _ in kept:
                os.dup2(said.fileno(), stream)
            # in notebooks and under pytest, Python's streams are not the process's
            with (
                os.fdopen(os.dup(said.fileno()), "w") as text,
                contextlib.redirect_stdout(text),
                contextlib.redirect_stderr(text),
            ):
                yield said
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        logging.disable(before)
