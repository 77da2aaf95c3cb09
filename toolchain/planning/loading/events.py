"""A loading plan: what a device loads, runs and frees, as one list of events for two threads.

The order of the list is the whole rule; nothing else has to be named, and nothing can wait in a circle, since every
event waits only for events that stand before it:

- ``load`` is done by the loader, one at a time and in order. It starts once the load before it is done and every
  ``run`` that stands before it has ended, so what was freed before it is free.
- ``run`` is done by the computer, one at a time and in order. It starts once the run before it has ended and its block,
  whose ``load`` stands before it, is loaded.
- ``free`` happens as soon as the run before it has ended.

So memory is bounded by the list alone, however long loads and runs really take. Repetition is kept: a section's events
are followed ``times`` times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.errors import BundleError

VERSION = 1
"""Of the plain data."""


@dataclass(frozen=True)
class Load:
    block: str


@dataclass(frozen=True)
class Execute:
    """``run`` in plain data: the next call, which is ``function`` of ``block``."""

    block: str
    function: str


@dataclass(frozen=True)
class Free:
    block: str


Event = Load | Execute | Free


@dataclass(frozen=True)
class Section:
    """``events`` in order, ``times`` times over."""

    times: int
    events: tuple[Event, ...]


@dataclass(frozen=True)
class LoadingPlan:
    """What to follow to stay within ``budget_bytes`` of weights, activations and values that live between calls."""

    budget_bytes: int
    sections: tuple[Section, ...]

    def events(self) -> Iterator[Event]:
        """All events, in order, repeated ones as often as they happen."""
        for section in self.sections:
            for _ in range(section.times):
                yield from section.events

    def to_data(self) -> dict[str, Any]:
        """Plain data, as JSON has it: events are ``{"load": B}``, ``{"run": B, "function": F}`` and ``{"free": B}``."""
        sections = [{"times": s.times, "events": [_event_data(e) for e in s.events]} for s in self.sections]
        return {"version": VERSION, "budget_bytes": self.budget_bytes, "sections": sections}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> LoadingPlan:
        """The plan that :meth:`to_data` gave.

        Raises:
            BundleError: it is none, or of a newer version; says where.
        """
        if data.get("version") != VERSION:
            raise BundleError(f"loading plan: version {data.get('version')!r} is not {VERSION}, the one that is known")
        if data.keys() != {"version", "budget_bytes", "sections"} or not isinstance(data["sections"], list):
            raise BundleError("loading plan: expected version, budget_bytes and a list of sections")
        sections = tuple(_section(s, f"sections.{i}") for i, s in enumerate(data["sections"]))
        return cls(_whole(data["budget_bytes"], "budget_bytes"), sections)


def _event_data(event: Event) -> dict[str, str]:
    if isinstance(event, Execute):
        return {"run": event.block, "function": event.function}
    return {"load" if isinstance(event, Load) else "free": event.block}


def _section(data: Any, where: str) -> Section:
    if not isinstance(data, dict) or data.keys() != {"times", "events"} or not isinstance(data["events"], list):
        raise BundleError(f"loading plan: {where}: expected times and a list of events")
    events = tuple(_event(e, f"{where}.events.{i}") for i, e in enumerate(data["events"]))
    return Section(_whole(data["times"], f"{where}.times"), events)


def _event(data: Any, where: str) -> Event:
    if isinstance(data, dict) and all(isinstance(v, str) for v in data.values()):
        if data.keys() == {"load"}:
            return Load(data["load"])
        if data.keys() == {"free"}:
            return Free(data["free"])
        if data.keys() == {"run", "function"}:
            return Execute(data["run"], data["function"])
    raise BundleError(f"loading plan: {where}: expected load, free, or run with function")


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BundleError(f"loading plan: {where}: expected a whole number from 1, got {value!r}")
    return value
