"""How many tasks may run at once: what each needs of memory, and which of those that wait may begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

PROCESS_BYTES = 900_000_000
"""What a process needs with torch and a converter loaded, measured with Core ML's."""
LOWERING_FACTOR, STAMPING_FACTOR, EXECUTING_FACTOR = 6, 1, 3
"""Memory for a lowering, for a stamp (both measured with T5-XXL's blocks) and for an execution in the gate (weights
read, decoded, and the engine's own), in sizes of the block's weights in float32."""


def needed_bytes(parameters: int, factor: int) -> int:
    """The memory that a process needs for a block of so many parameters, by one of the factors above."""
    return PROCESS_BYTES + factor * 4 * parameters


class Needs(Protocol):
    """What asks for admission."""

    @property
    def needed_bytes(self) -> int: ...


T = TypeVar("T", bound=Needs)


class Admission:
    """Lets tasks begin as long as they fit, both in number and in memory.

    A task that is larger than all the memory may try it alone, so every task has its turn in the end.

    Args:
        free_bytes: what the tasks may need together; no limit if None, as where the memory is another machine's.
        at_once: how many may run; any number if None.
    """

    def __init__(self, free_bytes: int | None = None, at_once: int | None = None) -> None:
        self._free_bytes: float = math.inf if free_bytes is None else free_bytes
        self._at_once: float = math.inf if at_once is None else at_once
        self._running = 0
        self._used_bytes = 0

    def next(self, waiting: Sequence[T]) -> T | None:
        """The first of those that wait that may begin now, and counts as running from now on; None if none may."""
        if self._running >= self._at_once:
            return None
        room = self._free_bytes - self._used_bytes
        chosen = next((task for task in waiting if task.needed_bytes <= room), None)
        if chosen is None and waiting and not self._running:
            chosen = waiting[0]
        if chosen is not None:
            self._running += 1
            self._used_bytes += chosen.needed_bytes
        return chosen

    def ended(self, task: Needs) -> None:
        """A task that :meth:`next` gave runs no more."""
        self._running -= 1
        self._used_bytes -= task.needed_bytes
