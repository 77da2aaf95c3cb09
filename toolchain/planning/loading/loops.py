"""Where a run repeats the same blocks, and ways to keep some of them in memory from one round to the next.

If loading takes longer than computing, it matters not only how many blocks stay but which: with the leading half of a
loop's blocks in memory the loader is idle while they run, and late for each of the others. If those that stay are
spread evenly, it loads all the time. And what stays need not be the same in every round: a block that is dropped gives
its bytes to the others until it is needed. Of m equal blocks with bytes for n, one of which always runs, m - n + 1 are
missed per round if the same stay, but m (m - n) / (m - 1) by Belady's optimal replacement. A pattern therefore is a
share of loads, spread evenly over the calls with a period of the loop's length (the same in every round) or of less
(rotating).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from toolchain.planning.loading.unrolled import Unrolled

AHEAD = 3
"""Stages before its call in which a rotating block is loaded, at most: the period is the loop's length less these."""
SMALL = 20
"""A block with so many times fewer bytes than its loop's largest always stays: it is in nobody's way."""
TICKS = 10**9
"""Of a second: shares are counted in whole numbers, so that a pattern repeats exactly."""


@dataclass(frozen=True)
class Loop:
    """Calls ``begin`` … ``end`` - 1: two rounds or more of the same ``length`` blocks, be it with other functions."""

    begin: int
    end: int
    length: int


def find_loops(u: Unrolled) -> list[Loop]:
    """All loops, in order."""
    loops = []
    for blocks, group in groupby(u.rounds, lambda r: tuple(u.block[r[0] : r[1]])):
        rounds = list(group)
        if len(rounds) > 1:
            loops.append(Loop(rounds[0][0], rounds[-1][1], len(blocks)))
    return loops


def patterns(u: Unrolled, loop: Loop) -> Iterator[list[list[bool]]]:
    """Families of ways to keep blocks: by call of the loop, whether its block stays until its next call.

    Each family goes from nothing kept to everything, and keeps more bytes from member to member, roughly.
    """
    length, calls = loop.length, loop.end - loop.begin
    size = [u.size[b] for b in u.block[loop.begin : loop.end]]
    always = [s * SMALL <= max(size) for s in size]
    load = [round(u.load[b] * TICKS) for b in u.block[loop.begin : loop.end]]
    compute = [round(e * TICKS) for e in u.compute[loop.begin : loop.end]]
    yield [[i % length < d for i in range(calls)] for d in range(length + 1)]
    for pace in (load, compute):
        yield [_repeated(_spread(load[:length], pace[:length], always, d, length), calls) for d in range(length + 1)]
    for period in range(length - 1, max(0, length - 1 - AHEAD), -1):
        yield [_spread(load, load, always, d, period) for d in range(period + 1)]


def _repeated(round_: list[bool], calls: int) -> list[bool]:
    return round_ * (calls // len(round_))


def _spread(load: list[int], pace: list[int], always: list[bool], kept: int, period: int) -> list[bool]:
    """Keep ``kept`` of ``period`` shares of all load time: what is dropped comes as evenly as ``pace`` goes on."""
    found, credit = [], 0
    total, paces = sum(load) or 1, sum(pace) or 1
    for seconds, passed, small in zip(load, pace, always, strict=False):
        credit += (period - kept) * passed * total
        due = period * seconds * paces
        dropped = not small and due > 0 and 2 * credit >= due
        credit -= due if dropped else 0
        found.append(not dropped)
    return found
