"""A run as flat lists of numbers, which planning goes over many times; a stage is the time up to the end of a call.

Stage i is everything between the ends of calls i-1 and i: waiting for call i's block, and running it.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.planning.loading.run import Call, Run


@dataclass(frozen=True)
class Unrolled:
    """``N`` calls of ``B`` blocks; blocks are indices into the lists of sizes and load times."""

    names: list[str]
    """``[B]`` of blocks."""
    size: list[int]
    """``[B]`` bytes of weights."""
    load: list[float]
    """``[B]`` seconds."""
    calls: list[Call]
    """``[N]``"""
    block: list[int]
    """``[N]`` block that is called."""
    compute: list[float]
    """``[N]`` seconds."""
    room: list[int]
    """``[N]`` bytes besides weights that are needed in a stage: the call's, or what waits for it."""
    following: list[int]
    """``[N]`` next call of the same block; N where there is none."""
    preceding: list[int]
    """``[N]`` last call of the same block; -1 where there is none."""
    rounds: list[tuple[int, int]]
    """``(first call, call after the last)`` of every repetition of every phase."""
    phases: list[tuple[int, int]]
    """The same of every phase, all its repetitions."""

    @property
    def least_budget(self) -> int:
        """Smallest budget that any plan works with: each stage needs its own block and its room."""
        return max(self.room[i] + self.size[b] for i, b in enumerate(self.block))


def unroll(run: Run) -> Unrolled:
    """The flat form of a run."""
    index = {b.name: i for i, b in enumerate(run.blocks)}
    calls = list(run.calls())
    block = [index[c.block] for c in calls]
    before = [0, *(c.live_bytes for c in calls[:-1])]
    room = [max(live, c.live_bytes + c.activation_bytes) for live, c in zip(before, calls, strict=True)]
    following, preceding = [len(calls)] * len(calls), [-1] * len(calls)
    last: dict[int, int] = {}
    for i, b in enumerate(block):
        if b in last:
            following[last[b]], preceding[i] = i, last[b]
        last[b] = i
    rounds, phases, at = [], [], 0
    for phase in run.phases:
        began = at
        for _ in range(phase.times):
            rounds.append((at, at + len(phase.calls)))
            at += len(phase.calls)
        phases.append((began, at))
    return Unrolled(
        names=[b.name for b in run.blocks],
        size=[b.weight_bytes for b in run.blocks],
        load=[b.load_s for b in run.blocks],
        calls=calls,
        block=block,
        compute=[c.compute_s for c in calls],
        room=room,
        following=following,
        preceding=preceding,
        rounds=rounds,
        phases=phases,
    )


def clipped(u: Unrolled, begin: int, end: int) -> Unrolled:
    """Calls ``begin`` … ``end`` - 1 by themselves, as one phase."""
    count = end - begin
    return Unrolled(
        names=u.names,
        size=u.size,
        load=u.load,
        calls=u.calls[begin:end],
        block=u.block[begin:end],
        compute=u.compute[begin:end],
        room=u.room[begin:end],
        following=[min(i - begin, count) for i in u.following[begin:end]],
        preceding=[i - begin if i >= begin else -1 for i in u.preceding[begin:end]],
        rounds=[(0, count)],
        phases=[(0, count)],
    )
