"""Where a build's time and memory went, from its events: by kind and component, the dearest tasks, as a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.formats.chrome_trace import ChromeTrace
from toolchain.listener import Listener
from toolchain.system.events import Event

BUILDS = ("build", "builds")
"""Kinds of what everything else is done within; its own time is what nothing else says of itself."""
NO_WORK = ("wait",)
"""Kinds during which others work."""
DEAREST = 5
COLOURS = {
    "template": "thread_state_uninterruptible",
    "artifact": "thread_state_running",
    "gate": "rail_response",
    "calibration": "rail_animation",
    "digest": "thread_state_iowait",
    "plan": "rail_load",
    "bundle": "good",
    "video": "cq_build_running",
    "budget": "yellow",
    "wait": "grey",
    "build": "generic_work",
    "builds": "generic_work",
}
"""chrome://tracing's names of colours, by kind."""


@dataclass
class Spent:
    """What tasks of a kind took in a component. Seconds are their own, so that sums count nothing twice."""

    kind: str
    component: str
    count: int = 0
    cached: int = 0
    failed: int = 0
    seconds: float = 0.0
    bytes_written: int = 0
    peak_bytes: int | None = None
    """The largest high-water mark of a process that one of them set; None if none set one."""

    def add(self, event: Event) -> None:
        """Count what ended."""
        self.count += 1
        self.cached += event.event == "cached"
        self.failed += event.event == "failed"
        self.seconds += event.own_seconds or 0.0
        self.bytes_written += event.bytes_written or 0
        if event.peak_bytes is not None and event.peak_grew_bytes:
            self.peak_bytes = max(self.peak_bytes or 0, event.peak_bytes)


class Record(Listener):
    """Keeps all events of a build."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    @property
    def ended(self) -> list[Event]:
        """Those of what is over; ``cached`` is over at once."""
        return [e for e in self.events if e.event in ("cached", "done", "failed")]

    @property
    def seconds(self) -> float:
        """From the start to the last event."""
        return max((e.time_s for e in self.events), default=0.0)

    def spent(self) -> list[Spent]:
        """By kind and component, the dearest first; what is no work comes last."""
        rows: dict[tuple[str, str], Spent] = {}
        for event in self.ended:
            place = event.what.kind, event.what.component
            rows.setdefault(place, Spent(*place)).add(event)
        return sorted(rows.values(), key=lambda r: (r.kind in NO_WORK, -r.seconds, r.kind, r.component))

    def dearest(self) -> list[Event]:
        """The tasks that took most by themselves."""
        tasks = [e for e in self.ended if e.what.kind not in (*BUILDS, *NO_WORK) and e.own_seconds is not None]
        return sorted(tasks, key=lambda e: -(e.own_seconds or 0.0))[:DEAREST]

    def to_data(self) -> dict[str, Any]:
        """Both as plain data; ``share`` is of the seconds of all work, in whatever process."""
        rows = self.spent()
        work = sum(r.seconds for r in rows if r.kind not in NO_WORK)
        return {
            "seconds": round(self.seconds, 6),
            "spent": [_row(r, work) for r in rows],
            "dearest": [e.data() for e in self.dearest()],
        }

    def trace(self) -> ChromeTrace:
        """A row for each process, the one that began first; spans lie within those that they were done in."""
        drawn, rows = ChromeTrace(), dict[str, int]()
        for event in self.events:
            if event.process not in rows:
                rows[event.process] = len(rows) + 1
                drawn.name_process(rows[event.process], event.process)
            if event.seconds is not None:
                _draw(drawn, rows[event.process], event, event.seconds)
        return drawn


def _row(row: Spent, work: float) -> Mapping[str, Any]:
    share = row.seconds / work if work and row.kind not in NO_WORK else None
    return {
        "kind": row.kind,
        "component": row.component or None,
        "count": row.count,
        "cached": row.cached,
        "failed": row.failed,
        "seconds": round(row.seconds, 6),
        "share": None if share is None else round(share, 4),
        "bytes_written": row.bytes_written,
        "peak_bytes": row.peak_bytes,
    }


def _draw(drawn: ChromeTrace, process: int, event: Event, seconds: float) -> None:
    what, start = event.what, event.time_s - seconds
    about = "/".join(part for part in (what.component, what.block or what.build) if part)
    colour = "terrible" if event.event == "failed" else COLOURS.get(what.kind)
    drawn.span(process, 1, f"{what.kind} {about}".rstrip(), what.kind, start, seconds, event.data(), colour)
    if event.peak_bytes is not None:
        drawn.counter(process, "peak of memory", event.time_s, {"bytes": event.peak_bytes})
