"""Loads in their order with the stage in which each may start: what planning chooses, before it is written as events.

Two things decide a schedule: after which calls a block stays in memory until its next call (``kept``), and the order of
the loads that this leaves. All else follows. A block that does not stay is freed when its call ends, since holding it
longer gains nothing. Given the order, every load should start as early as memory allows: times only ever add up and
wait for one another (maxima and sums), so an earlier start makes nothing later, and what an earlier load holds
meanwhile is in no later load's way, since that may not overtake it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.planning.loading.unrolled import Unrolled


@dataclass(frozen=True)
class Schedule:
    """``loads`` are (stage, block), in loading order; ``stays`` says of each of ``[N]`` calls if its block stays."""

    loads: tuple[tuple[int, int], ...]
    stays: tuple[bool, ...]
    finish_s: float
    """When the last call ends, if loading and computing do not slow each other."""
    serial_s: float
    """All loads and calls, one after the other."""

    def total_s(self, overlap_loss: float) -> float:
        """When the last call ends: see :mod:`toolchain.planning.loading.simulate`."""
        return (1 - overlap_loss) * self.finish_s + overlap_loss * self.serial_s


def timed(u: Unrolled, loads: Sequence[tuple[int, int]], stays: Sequence[bool]) -> Schedule:
    """A schedule with its times."""
    loader = computer = work = 0.0
    ready = [0.0] * len(u.size)
    place = 0
    for i, block in enumerate(u.block):
        while place < len(loads) and loads[place][0] == i:
            b = loads[place][1]
            loader = max(loader, computer) + u.load[b]
            ready[b] = loader
            work += u.load[b]
            place += 1
        computer = max(computer, ready[block]) + u.compute[i]
    return Schedule(tuple(loads), tuple(stays), computer, work + sum(u.compute))


def place(u: Unrolled, kept: Sequence[bool], budget_bytes: int) -> Schedule | None:
    """Loads in the order in which their blocks are needed, each as early as memory allows; None if they do not fit.

    A block that is kept nowhere else but could be loaded again at once stays: that takes the same memory and no load.
    With more memory no load starts later, and none is added, so the schedule is never slower.

    Args:
        kept: by call, whether its block shall stay until its next call.
    """
    count = len(u.block)
    free = free_bytes(u, kept, budget_bytes)
    if min(free) < 0:
        return None
    stays = [u.following[i] < count and (kept[i] or u.following[i] == i + 1) for i in range(count)]
    loads: list[tuple[int, int]] = []
    earliest = 0
    for need, block in enumerate(u.block):
        before = u.preceding[need]
        if before >= 0 and stays[before]:
            continue
        size, stage, limit = u.size[block], need, max(earliest, before + 1)
        while stage > limit and free[stage - 1] >= size:
            stage -= 1
            free[stage] -= size
        if before >= 0 and stage == before + 1:
            stays[before] = True
        else:
            loads.append((stage, block))
            earliest = stage
    return timed(u, loads, stays)


def free_bytes(u: Unrolled, kept: Sequence[bool], budget_bytes: int) -> list[int]:
    """By stage, what is left beside its room, its own block and the blocks that stay; negative if that is too much."""
    change = [0] * (len(u.block) + 1)
    for i, after in enumerate(u.following):
        if kept[i] and i + 1 < after < len(u.block):
            change[i + 1] += u.size[u.block[i]]
            change[after] -= u.size[u.block[i]]
    free, held = [], 0
    for i, block in enumerate(u.block):
        held += change[i]
        free.append(budget_bytes - held - u.size[block] - u.room[i])
    return free


def needed_bytes(u: Unrolled, kept: Sequence[bool]) -> int:
    """Smallest budget that ``kept`` fits into."""
    return -min(free_bytes(u, kept, 0))
