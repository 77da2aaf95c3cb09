"""Running a command and watching its memory."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import psutil


def run(command: list[str], cwd: Path) -> tuple[float, int, str]:
    """Run a command; returns seconds, peak bytes of the process tree, and its standard output."""
    peak = 0
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for p in [tree, *_children(tree)]:
                try:
                    total += p.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, peak, out


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
