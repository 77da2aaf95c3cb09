"""A schedule written as events, with what repeats folded into sections."""

from __future__ import annotations

from toolchain.planning.loading.events import Event, Execute, Free, Load, LoadingPlan, Section
from toolchain.planning.loading.schedule import Schedule
from toolchain.planning.loading.unrolled import Unrolled

LONGEST = 64
"""Rounds of a phase that are looked at as one that repeats: a rotating pattern repeats only after many."""


def write(u: Unrolled, schedule: Schedule, budget_bytes: int) -> LoadingPlan:
    """The events of a schedule. Rounds of a phase with the same events are one section."""
    loads: list[list[Event]] = [[] for _ in u.block]
    for stage, block in schedule.loads:
        loads[stage].append(Load(u.names[block]))
    sections: list[Section] = []
    for begin, end in u.phases:
        rounds = [_events(u, schedule, loads, *r) for r in u.rounds if begin <= r[0] < end]
        sections += _fold(rounds)
    return LoadingPlan(budget_bytes, tuple(sections))


def _events(u: Unrolled, schedule: Schedule, loads: list[list[Event]], begin: int, end: int) -> tuple[Event, ...]:
    events: list[Event] = []
    for i in range(begin, end):
        events += [*loads[i], Execute(u.calls[i].block, u.calls[i].function)]
        if not schedule.stays[i]:
            events.append(Free(u.calls[i].block))
    return tuple(events)


def _fold(rounds: list[tuple[Event, ...]]) -> list[Section]:
    """Sections of rounds, from the first on those that save most."""
    numbers: dict[tuple[Event, ...], int] = {}
    word = [numbers.setdefault(r, len(numbers)) for r in rounds]
    sections: list[Section] = []
    at = 0
    while at < len(word):
        length, times = 1, 1
        for period in range(1, min(LONGEST, (len(word) - at) // 2) + 1):
            repeats = 1
            while word[at + repeats * period : at + (repeats + 1) * period] == word[at : at + period]:
                repeats += 1
            if (repeats - 1) * period > (times - 1) * length:
                length, times = period, repeats
        sections.append(Section(times, tuple(e for r in rounds[at : at + length] for e in r)))
        at += length * times
    return sections
