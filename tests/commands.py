"""Running ``sora-compile``: in the tests' own process, or in one of its own.

A process of its own imports torch and the converters anew, for seconds. So tests of what the command says and
leaves use the first; tests of signals, hash seeds, what is imported and what reaches the shell use the second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import pytest

from toolchain.cli import main


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


class RunCli(Protocol):
    def __call__(self, *args: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Ran: ...


def command(*args: str | Path) -> list[str]:
    """The command line of ``sora-compile`` with this Python."""
    return [sys.executable, "-m", "toolchain.cli", *map(str, args)]


def run_process(*args: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run it in a process of its own."""
    done = subprocess.run(
        command(*args), cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=900
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def start_process(
    *args: str | Path, cwd: Path, cache: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start it in a process that can be sent signals as from a terminal."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # an empty cache, or there would be little to interrupt
    own = str(cache or tempfile.mkdtemp(dir=os.environ["SORA_COMPILE_CACHE"]))
    whole = {**os.environ, "SORA_COMPILE_CACHE": own, **(env or {})}
    return subprocess.Popen(command(*args), cwd=cwd, env=whole, preexec_fn=_hear_interrupts, **pipes)


def _hear_interrupts() -> None:
    """Undo what a background job inherits: SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_here(*args: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run it in this process, which is left as it was: streams, working folder, environment, handlers."""
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(_caught(number)) for number in (1, 2))
        stack.enter_context(contextlib.redirect_stdout(_stream(1)))
        stack.enter_context(contextlib.redirect_stderr(_stream(2)))
        stack.enter_context(_warnings_shown())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["sora-compile", *map(str, args)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        code = _code()
        sys.stdout.flush()
        sys.stderr.flush()
        return Ran(code, _text(out), _text(err))


def _code() -> int:
    """What the shell would be told of ``main``."""
    try:
        main()
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        sys.stderr.write(f"{e.code}\n")
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def _caught(number: int) -> Iterator[IO[bytes]]:
    """A file that takes what is written to a descriptor, by whatever language."""
    before = os.dup(number)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), number)
            try:
                yield file
            finally:
                os.dup2(before, number)
    finally:
        os.close(before)


def _stream(number: int) -> IO[str]:
    return open(number, "w", encoding="utf-8", closefd=False)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Warnings go to stderr, and by the filters with which Python starts, as if nobody collected them."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *a, **_: sys.stderr.write(warnings.formatwarning(*a[:4]))
        yield


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
