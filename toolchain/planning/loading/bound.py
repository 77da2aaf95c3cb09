"""What no loading plan within a budget can beat: a lower bound of the time of a run.

The run is cut into windows of calls, one after the other, and each window takes at least

- as long as its calls compute, and
- as long as its loads take, and its last call after them: every block that is called in it once, but for what may be
  in memory already when it begins, and a block again for every pair of its calls between which it does not stay. Blocks
  that stay hold their bytes for as many stages as lie between their calls, and all stages together have only so many
  bytes to give; which pairs are worth them most is a knapsack, filled here with fractions, which is never worse.

The bound is the largest sum over all ways to cut at some places (:func:`_cuts`).
"""

from __future__ import annotations

from itertools import accumulate

from toolchain.planning.loading.unrolled import Unrolled


def lower_bound_s(u: Unrolled, budget_bytes: int, overlap_loss: float) -> float:
    """Seconds that any plan within ``budget_bytes`` (:attr:`Unrolled.least_budget` or more) takes at least."""
    windows = _Windows(u, budget_bytes)
    cuts = _cuts(u)
    best = {0: 0.0}
    for n, end in enumerate(cuts[1:], 1):
        best[end] = max(best[begin] + windows.seconds(begin, end) for begin in cuts[:n])
    count = len(u.block)
    serial = sum(u.compute) + windows.loads_s(0, count)
    return (1 - overlap_loss) * best[count] + overlap_loss * serial


def _cuts(u: Unrolled) -> list[int]:
    """Between phases, after their first round and before their last, and after the first call."""
    cuts = {0, 1, len(u.block)}
    for begin, end in u.phases:
        own = [r for r in u.rounds if begin <= r[0] < end]
        cuts |= {begin, end, own[0][1], own[-1][0]}
    return sorted(cuts)


class _Windows:
    def __init__(self, u: Unrolled, budget_bytes: int) -> None:
        self.u, self.budget_bytes = u, budget_bytes
        self.compute = [0.0, *accumulate(u.compute)]
        spare = (budget_bytes - u.room[i] - u.size[b] for i, b in enumerate(u.block))
        self.spare = [0, *accumulate(spare)]
        count = len(u.block)
        gaps = [
            (i, after, u.load[u.block[i]], u.size[u.block[i]] * (after - i - 1))
            for i, after in enumerate(u.following)
            if after < count
        ]
        self.gaps = sorted(gaps, key=lambda g: g[2] / g[3] if g[3] else float("inf"), reverse=True)
        self.by_worth = sorted(
            range(len(u.size)), key=lambda b: u.load[b] / u.size[b] if u.size[b] else float("inf"), reverse=True
        )

    def seconds(self, begin: int, end: int) -> float:
        """What the calls ``begin`` … ``end`` - 1 take at least, from the end of the call before."""
        loads = self.loads_s(begin, end)
        last = self.u.compute[end - 1] if loads > 0 else 0.0
        return max(self.compute[end] - self.compute[begin], loads + last)

    def loads_s(self, begin: int, end: int) -> float:
        """Loads after the end of call ``begin`` - 1 that the window needs."""
        called = set(self.u.block[begin:end])
        first = sum(self.u.load[b] for b in called)
        return max(0.0, first - self._held_s(begin, called)) + self._again_s(begin, end)

    def _held_s(self, begin: int, called: set[int]) -> float:
        """Load time of the window's blocks that may be in memory when it begins."""
        if begin == 0:
            return 0.0
        left, saved = self.budget_bytes - self.u.calls[begin - 1].live_bytes, 0.0
        for b in self.by_worth:
            if b in called:
                if self.u.size[b] >= left:
                    return saved + (self.u.load[b] * left / self.u.size[b] if self.u.size[b] else 0.0)
                left -= self.u.size[b]
                saved += self.u.load[b]
        return saved

    def _again_s(self, begin: int, end: int) -> float:
        """Loads of blocks that the window calls again."""
        left, again = float(self.spare[end] - self.spare[begin]), 0.0
        for i, after, load, bytes_stages in self.gaps:
            if begin <= i and after < end:
                share = min(1.0, left / bytes_stages) if bytes_stages else 1.0
                left -= share * bytes_stages
                again += (1 - share) * load
        return again
