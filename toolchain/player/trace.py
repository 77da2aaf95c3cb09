"""A record of loads and runs, in the Chrome trace format (opens in Perfetto)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path


class Trace:
    """Spans of time, in microseconds from the start; components are threads of one process."""

    def __init__(self) -> None:
        self._start = time.perf_counter_ns()
        self._events: list[dict[str, object]] = []
        self._threads: dict[str, int] = {}

    @contextlib.contextmanager
    def span(self, name: str, category: str, component: str) -> Iterator[None]:
        """Record the body as a span called ``name``: ``load`` or ``run`` of a block."""
        thread = self._threads.setdefault(component, len(self._threads) + 1)
        began = time.perf_counter_ns()
        try:
            yield
        finally:
            ended = time.perf_counter_ns()
            event = {"name": name, "cat": category, "ph": "X", "pid": 1, "tid": thread}
            self._events.append(event | {"ts": (began - self._start) / 1e3, "dur": (ended - began) / 1e3})

    def seconds(self, category: str) -> float:
        """Total time of a category's spans."""
        return sum(float(str(e["dur"])) for e in self._events if e["cat"] == category) / 1e6

    def write(self, path: Path, about: Mapping[str, str] | None = None) -> None:
        """Write the trace as JSON; ``about`` says what was played."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": component}}
            for component, tid in self._threads.items()
        ]
        data = {"traceEvents": [*names, *self._events], "displayTimeUnit": "ms", "otherData": dict(about or {})}
        path.write_text(json.dumps(data), encoding="utf-8")
