"""Running a command and watching what it takes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

BLOCK_BYTES = 512
"""Unit in which the kernel counts what a process writes."""


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds, and in bytes the peak memory of its process tree and what this wrote to files.

    ``processor`` are the seconds that processors worked for it, which other work on the machine hardly changes.
    """

    seconds: float
    processor: float
    peak: int
    written: int
    output: str


def run(command: list[str], cwd: Path) -> Cost:
    """Run a command to its end.

    Raises:
        SystemExit: it failed.
    """
    peak = 0
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while not ended.wait(0.02):
            peak = max(peak, sum(_resident(p) for p in [tree, *_children(tree)]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # children that it waited for are included
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak, usage.ru_oublock * BLOCK_BYTES, output)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []
