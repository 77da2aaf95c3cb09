"""The published rule, Concurrent Inference with Dynamic Loading (On-device Sora, arXiv 2502.04363), as the baseline.

A component's blocks run in a loop; d leading ones stay in memory, as many as the budget holds beside the block that
runs and the next one; while a block runs, the next one is loaded unless it is there. To make the baseline as good as
the rule allows, the next one is loaded across components, too, and where two blocks do not fit, one is loaded alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from toolchain.planning.loading.loops import Loop, find_loops
from toolchain.planning.loading.schedule import Schedule, free_bytes, timed
from toolchain.planning.loading.unrolled import Unrolled


def saved_s(blocks: int, load_s: float, compute_s: float, resident: int = 0, overlap_lost_s: float = 0.0) -> float:
    """What the rule saves of ``b · (l + e)`` seconds in one pass over b equal blocks: equations 10 and 11.

    r = b · min(l, e) + d · max(0, l - e) - α · (1 - d / b), with d ``resident`` blocks and α ``overlap_lost_s``;
    without resident blocks that is r = b · min(l, e) - α.

    The simulator gives exactly this for every pass whose first block is loaded while the last block of the pass before
    runs, or is resident. It does not hold for the first pass, for its first load has nothing to hide behind: that pass
    saves (b - 1) · (min(l, e) - α / b). And it holds with α = λ · b · min(l, e), where λ is the simulator's overlap
    loss: α is what all b loads of a pass lose.
    """
    share = resident / blocks
    hidden = blocks * min(load_s, compute_s)
    return hidden + resident * max(0.0, load_s - compute_s) - overlap_lost_s * (1 - share)


def leading_kept(u: Unrolled, budgets: Sequence[int]) -> Iterator[list[bool]]:
    """For each budget, by call, whether its block stays until its next call: the d leading blocks of every loop."""
    loops = [(loop, needed_by_leading(u, loop)) for loop in find_loops(u)]
    for budget in budgets:
        kept = [False] * len(u.block)
        for loop, needed in loops:
            d = max((d for d, bytes_ in enumerate(needed) if bytes_ <= budget), default=0)
            staying = set(u.block[loop.begin : loop.begin + d])
            for i in range(loop.begin, loop.end):
                kept[i] = u.block[i] in staying and u.following[i] < loop.end
        yield kept


def leading_budgets(u: Unrolled) -> list[int]:
    """The budgets at which one more leading block of some loop can stay."""
    return sorted({needed for loop in find_loops(u) for needed in needed_by_leading(u, loop)})


def needed_by_leading(u: Unrolled, loop: Loop) -> list[int]:
    """By d from 0, the bytes that d leading blocks of a loop take, with the one that runs and the next."""
    blocks = u.block[loop.begin : loop.begin + loop.length]
    pairs = [{a, b} for a, b in zip(blocks, [*blocks[1:], blocks[0]], strict=True)]
    room = [max(u.room[i] for i in range(loop.begin + k, loop.end, loop.length)) for k in range(loop.length)]
    needed = []
    for d in range(loop.length + 1):
        staying = set(blocks[:d])
        held = sum(u.size[b] for b in staying)
        needed.append(held + max(r + sum(u.size[b] for b in p - staying) for r, p in zip(room, pairs, strict=True)))
    return needed


def paper_schedule(u: Unrolled, budget_bytes: int) -> Schedule:
    """The rule's schedule; the budget has to be :attr:`Unrolled.least_budget` or more."""
    kept = next(leading_kept(u, [budget_bytes]))
    free = free_bytes(u, kept, budget_bytes)
    loads: list[tuple[int, int]] = []
    stays = [after < len(u.block) and (kept[i] or after == i + 1) for i, after in enumerate(u.following)]
    for need, block in enumerate(u.block):
        before = u.preceding[need]
        if before < 0 or not stays[before]:
            ahead = need > 0 and free[need - 1] >= u.size[block]
            loads.append((need - 1 if ahead else need, block))
    return timed(u, loads, stays)
