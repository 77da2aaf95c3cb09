"""A record of loads and runs, as a Chrome trace, beside what was predicted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolchain.formats.chrome_trace import ChromeTrace
from toolchain.planning.loading.simulate import Timeline

Category = Literal["load", "run"]
LANES: dict[str, int] = {"load": 1, "run": 2}
"""Threads of a trace's process, by category."""
LANE_NAMES = {1: "loader", 2: "compute"}
PLAYED, PREDICTED = 1, 2
"""Processes of a trace."""


@dataclass
class Record:
    """A load, or a run of ``function``, of ``COMPONENT/BLOCK``. Seconds are from the trace's start."""

    category: Category
    block: str
    function: str | None
    start_s: float
    end_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class Trace:
    """Loads, runs, and bytes held over time; two threads may record at once."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.records: list[Record] = []
        """In the order in which they ended."""
        self.memory: list[tuple[float, int]] = []
        """``(from when, bytes)``: as a plan counts them."""

    @classmethod
    def of(cls, timeline: Timeline) -> Trace:
        """What a simulation gave, as if it had been played."""
        trace = cls()
        spans = (*timeline.loads, *timeline.runs)
        trace.records = [Record(s.kind, s.block, s.function, s.start_s, s.end_s) for s in spans]
        trace.memory = list(timeline.memory)
        return trace

    @contextlib.contextmanager
    def span(self, category: Category, block: str, function: str | None = None) -> Iterator[Record]:
        """Record the body."""
        record = Record(category, block, function, self.now())
        try:
            yield record
        finally:
            record.end_s = self.now()
            self.records.append(record)

    def hold(self, bytes_: int) -> None:
        """From now on so many bytes are held."""
        self.memory.append((self.now(), bytes_))

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def data(self, about: Mapping[str, Any], predicted: Trace | None = None) -> dict[str, Any]:
        """Plain data in Chrome's format: processes ``played`` and ``predicted``, each a loader and a computer.

        Args:
            about: what was played.
        """
        return self._chrome(predicted).data(about)

    def write(self, path: Path, about: Mapping[str, Any], predicted: Trace | None = None) -> None:
        """Write :meth:`data` as JSON."""
        self._chrome(predicted).write(path, about)

    def _chrome(self, predicted: Trace | None) -> ChromeTrace:
        drawn = ChromeTrace()
        _draw(drawn, PLAYED, "played", self)
        if predicted is not None:
            _draw(drawn, PREDICTED, "predicted", predicted)
        return drawn


def _draw(drawn: ChromeTrace, process: int, name: str, trace: Trace) -> None:
    drawn.name_process(process, name)
    for thread, lane in LANE_NAMES.items():
        drawn.name_thread(process, thread, lane)
    for r in trace.records:
        title = r.block if r.function is None else f"{r.block}.{r.function}"
        what = {"block": r.block} | ({} if r.function is None else {"function": r.function})
        drawn.span(process, LANES[r.category], title, r.category, r.start_s, r.seconds, what)
    for start, bytes_ in trace.memory:
        drawn.counter(process, "memory", start, {"bytes": bytes_})
