"""Keeping converters and runtimes quiet, and reading what they said when they fail."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Silence converters: progress bars of their own, remarks on versions, missing accelerators and the CPU.

    They write to the process's streams from Python and from C++, so the streams themselves are redirected;
    what they raise is not touched. Yields a function that returns what was said.
    """
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
            with os.fdopen(os.dup(said.fileno()), "w") as text:

                def read() -> str:
                    text.flush()
                    said.seek(0)
                    return said.read().decode(errors="replace")

                # in notebooks and under pytest, Python's streams are not the process's
                with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                    yield read
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        logging.disable(before)
