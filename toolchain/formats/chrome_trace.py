"""The Chrome trace format, which Perfetto and chrome://tracing open: spans in rows of processes, and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ChromeTrace:
    """A trace that is being put together. Seconds are from the trace's start."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def name_process(self, process: int, name: str) -> None:
        """Call a process of the trace something."""
        self._events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})

    def name_thread(self, process: int, thread: int, name: str) -> None:
        """Call a row of a process something."""
        self._events.append({"name": "thread_name", "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})

    def span(
        self,
        process: int,
        thread: int,
        name: str,
        category: str,
        start_s: float,
        seconds: float,
        args: Mapping[str, Any],
        colour: str | None = None,
    ) -> None:
        """Something that took a while.

        Args:
            colour: one of the names that chrome://tracing has for colours (``cname``); Perfetto picks its own by name.
        """
        span = {"name": name, "cat": category, "ph": "X", "pid": process, "tid": thread}
        span |= {"ts": start_s * 1e6, "dur": seconds * 1e6, "args": dict(args)}
        self._events.append(span | ({} if colour is None else {"cname": colour}))

    def counter(self, process: int, name: str, start_s: float, values: Mapping[str, float]) -> None:
        """What a curve shows from then on."""
        self._events.append({"name": name, "ph": "C", "pid": process, "ts": start_s * 1e6, "args": dict(values)})

    def data(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Plain data in Chrome's format.

        Args:
            about: what the trace is of.
        """
        return {"traceEvents": self._events, "displayTimeUnit": "ms", "otherData": dict(about)}

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write :meth:`data` as JSON."""
        path.write_text(json.dumps(self.data(about)), encoding="utf-8")
