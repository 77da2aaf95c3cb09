"""How processes of our own end: with the first one, whatever ends it, and without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

FIRST = """
import multiprocessing, os, signal, sys, time
from toolchain.build.executors import OwnProcesses

def work():
    global lock
    lock = multiprocessing.get_context("spawn").RLock()  # as libraries make them
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    executor = OwnProcesses(1)
    try:
        executor.submit(work).result()
    except KeyboardInterrupt:
        start = time.monotonic()
        executor.kill()
        sys.exit(time.monotonic() - start > 1.5)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_first(tmp_path: Path, number: int) -> None:
    """An interrupt reaches all of them, as from a terminal; what a library made in them leaks nothing then."""
    script = tmp_path / "first.py"
    script.write_text(FIRST)
    first = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert first.stdout is not None
    worker = psutil.Process(int(first.stdout.readline()))
    if number == signal.SIGKILL:
        first.kill()
    else:
        os.killpg(first.pid, number)
    start = time.monotonic()
    worker.wait(10)
    assert time.monotonic() - start < 5
    _, err = first.communicate(timeout=10)
    if number == signal.SIGINT:
        assert (first.returncode, err) == (0, "")
