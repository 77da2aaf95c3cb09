"""The planner: what to load, keep and free so that a run takes the least time within a budget of memory.

Small runs are solved exactly, where that does not take too long. For others, schedules are built from ways to keep
blocks that do not depend on the budget, and the fastest of those that fit is taken. So a larger budget has all the
choices of a smaller one and is never slower, unless only the smaller one was solved exactly; and among the choices are
all that the published rule would make, so the plan is never slower than that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from toolchain.errors import RecipeError
from toolchain.planning.loading.bound import lower_bound_s
from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.exact import best_schedule, is_small
from toolchain.planning.loading.loops import Loop, find_loops, patterns
from toolchain.planning.loading.paper import leading_budgets, leading_kept, paper_schedule
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.schedule import needed_bytes, place
from toolchain.planning.loading.unrolled import Unrolled, clipped, unroll
from toolchain.planning.loading.writing import write

ROUNDS = 4
"""Of a loop that ways to keep its blocks are tried on."""
TRIED = 3
"""Ways of each family that are tried: those that keep most."""
STEPS = 40
"""Budgets, up to the one that is given, that ways are chosen for."""

CLOSE = 1e-12
"""Times that differ by less, relatively, are the same: sums of floats are no more exact."""


@dataclass(frozen=True)
class Planned:
    """A plan, and what it is worth. Seconds are predicted by simulation.

    No plan within the budget takes less than ``bound_s``; where the plan is proven to be the best, that is ``total_s``.
    ``paper_s`` is what the published rule takes.
    """

    plan: LoadingPlan
    total_s: float
    bound_s: float
    paper_s: float

    @property
    def gap(self) -> float:
        """How much less, relatively, the best plan could take at most."""
        return max(0.0, 1 - self.bound_s / self.total_s) if self.total_s > 0 else 0.0


def plan_loading(run: Run, budget_bytes: int, overlap_loss: float = 0.0) -> Planned:
    """What to load, keep and free within ``budget_bytes`` of weights, activations and values that live between calls.

    Args:
        overlap_loss: share of hidden load time that is lost because both are slower, 0 … 1; see
            :mod:`toolchain.planning.loading.simulate`.

    Raises:
        RecipeError: the budget is too small; names the smallest that works, and the block and function that need it.
    """
    u = unroll(run)
    check_budget(u, budget_bytes)
    placed = [s for kept in _choices(u, budget_bytes, overlap_loss) if (s := place(u, kept, budget_bytes))]
    fastest = min(s.total_s(overlap_loss) for s in placed)
    # of those that are as fast, the one that loads least
    best = min((s for s in placed if s.total_s(overlap_loss) <= fastest * (1 + CLOSE)), key=lambda s: s.serial_s)
    bound = lower_bound_s(u, budget_bytes, overlap_loss)
    if is_small(u) and best.total_s(overlap_loss) > bound * (1 + CLOSE):  # else nothing is faster
        exact = best_schedule(u, budget_bytes, overlap_loss, best)
        if exact is not None:
            best, bound = exact, exact.total_s(overlap_loss)
    paper = paper_schedule(u, budget_bytes).total_s(overlap_loss)
    total = best.total_s(overlap_loss)
    return Planned(write(u, best, budget_bytes), total, min(bound, total), paper)


def check_budget(u: Unrolled, budget_bytes: int) -> None:
    """Raises RecipeError unless every call fits with its block alone."""
    least = u.least_budget
    if budget_bytes < least:
        at = next(i for i, b in enumerate(u.block) if u.room[i] + u.size[b] == least)
        call = u.calls[at]
        raise RecipeError(
            f"memory budget: {budget_bytes / 1e6:.1f} MB is too little; '{call.block}' ({call.function}) needs "
            f"{least} bytes ({u.size[u.block[at]] / 1e6:.1f} MB of weights, {u.room[at] / 1e6:.1f} MB of activations), "
            "which is the smallest budget that works; cut smaller blocks (partition: {max_bytes: …}) or raise it"
        )


def _choices(u: Unrolled, budget_bytes: int, overlap_loss: float) -> Iterator[list[bool]]:
    """Ways to keep blocks: by call, whether its block stays until its next call."""
    yield [False] * len(u.block)
    yield from leading_kept(u, [step for step in leading_budgets(u) if step <= budget_bytes])
    yield from _Patterns(u, overlap_loss).choices(budget_bytes)


class _Patterns:
    """The best pattern of every loop, by itself, at budgets that do not depend on the one that is given."""

    def __init__(self, u: Unrolled, overlap_loss: float) -> None:
        self.u, self.overlap_loss = u, overlap_loss
        self.loops = find_loops(u)
        self.families: list[list[list[tuple[int, list[bool]]]]] = []
        for loop in self.loops:
            part = clipped(u, loop.begin, loop.end)
            ways = [[(needed_bytes(part, kept), kept) for kept in family] for family in patterns(u, loop)]
            self.families.append([sorted(family, key=lambda way: way[0]) for family in ways])

    def choices(self, budget_bytes: int) -> Iterator[list[bool]]:
        steps = sorted({needed for families in self.families for ways in families for needed, _ in ways})
        if len(steps) > STEPS:
            steps = [steps[round(k * (len(steps) - 1) / (STEPS - 1))] for k in range(STEPS)]
        for step in steps[: bisect_right(steps, budget_bytes)]:
            kept = [False] * len(self.u.block)
            for loop, families in zip(self.loops, self.families, strict=True):
                way = self._best(loop, families, step)
                for i in range(loop.begin, loop.end):
                    kept[i] = way is not None and way[i - loop.begin] and self.u.following[i] < loop.end
            yield kept

    def _best(self, loop: Loop, families: list[list[tuple[int, list[bool]]]], budget: int) -> list[bool] | None:
        part = clipped(self.u, loop.begin, min(loop.end, loop.begin + ROUNDS * loop.length))
        best: tuple[float, float, list[bool]] | None = None
        for ways in families:
            fitting = bisect_right(ways, budget, key=lambda way: way[0])
            for _, kept in ways[max(0, fitting - TRIED) : fitting]:
                schedule = place(part, kept, budget)
                if schedule is None:
                    continue
                time = schedule.total_s(self.overlap_loss), schedule.serial_s
                if best is None or time < best[:2]:
                    best = (*time, kept)
        return best[2] if best else None
