"""Which steps compute what: every best trade of time for error, by dynamic programming over the steps.

A step computes a range of blocks or reuses what it added, for both halves of guidance or for the conditional one
alone. What a step costs in error depends on which steps it takes things from: the last one that computed the range,
and the last one that called both halves. These two are the state. Errors of steps are added, or the largest is
taken (as LeMiCa does); for either the result is exact. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from toolchain.formats.reuse import Difference

Mode = Literal["both", "conditional", "reuse", "reuse conditional"]
"""What a step does: computes the range or reuses it, for both halves of guidance or for the conditional one alone."""
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
Objective = Literal["sum", "largest"]
NEVER: Final = -1
"""In the place of a step: there was none."""
Numbers: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class StepErrors:
    """What steps lose that take things from earlier ones, in any unit that adds up.

    ``reused[a, j]``: step j calls both halves and reuses the range as step a computed it. ``alone[a, j]``: step j
    calls the conditional half alone, without any difference, and reuses the range of step a; a = j computes it.
    ``kept[a, b, j]``: the same with the difference of step b. All are float64 ``[n, n]`` and ``[n, n, n]`` for n steps.
    """

    reused: Numbers
    alone: Numbers
    kept: Numbers

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return int(self.reused.shape[0])


@dataclass(frozen=True)
class Found:
    """What each step does, what that costs in all (the unit is the caller's), and the error that is expected."""

    modes: tuple[Mode, ...]
    cost: int
    error: float


class _State(NamedTuple):
    """``computed``: the last step that computed the range; ``whole``: for both halves; ``both``: the last step that
    called both halves, where their difference is used."""

    computed: int
    whole: bool
    both: int


@dataclass(frozen=True)
class _Labels:
    """Ways to reach a state, none of them worse than another in both cost and error, with where they are from."""

    cost: Numbers
    error: Numbers
    mode: Numbers
    state: Numbers
    """Of the step before: the place in its list of states, and below the place in the labels of that one."""
    label: Numbers


def search(
    errors: StepErrors,
    costs: Sequence[Mapping[Mode, int]],
    difference: Difference,
    *,
    modes: Collection[Mode] = MODES,
    objective: Objective = "sum",
) -> list[Found]:
    """The front: for every cost the schedule of least error, the dearest first.

    Args:
        costs: of each step by mode, in whole units, so that equal sums are equal.
        difference: what stands for the difference of halves where the conditional one is called alone.
        modes: those that steps may have; ``both`` is always one.
    """
    allowed = {"both", *modes}
    reached = [{_State(NEVER, False, NEVER): _start()}]
    for j in range(errors.steps):
        before = reached[-1]
        ways: dict[_State, list[_Labels]] = {}
        for place, (state, labels) in enumerate(before.items()):
            for mode in MODES:
                after = _after(state, mode, j, difference) if mode in allowed else None
                if after is not None:
                    own = _error(errors, after, mode, j, difference), costs[j][mode]
                    ways.setdefault(after, []).append(_extended(labels, place, mode, *own, objective))
        reached.append({state: _pruned(found) for state, found in ways.items()})
    states = list(reached[-1])
    last = [
        _Labels(own.cost, own.error, own.mode, np.full(len(own.cost), i), np.arange(len(own.cost)))
        for i, own in enumerate(reached[-1].values())
    ]
    best = _pruned(last)
    order = np.argsort(-best.cost)
    return [_traced(reached, states, best, int(k)) for k in order]


def _after(state: _State, mode: Mode, j: int, difference: Difference) -> _State | None:
    """The state that a step leads to; None if it would take what there is not."""
    reuses, alone = mode.startswith("reuse"), mode.endswith("conditional")
    if reuses and (state.computed == NEVER or (not alone and not state.whole)):
        return None
    if alone and difference == "last" and state.both == NEVER:
        return None
    both = state.both if alone or difference == "none" else j
    return _State(state.computed, state.whole, both) if reuses else _State(j, not alone, both)


def _error(errors: StepErrors, after: _State, mode: Mode, j: int, difference: Difference) -> float:
    if mode == "both":
        return 0.0
    if mode == "reuse":
        return float(errors.reused[after.computed, j])
    if difference == "none":
        return float(errors.alone[after.computed, j])
    return float(errors.kept[after.computed, after.both, j])


def _start() -> _Labels:
    zero = np.zeros(1, np.int64)
    return _Labels(zero, np.zeros(1), zero, zero, zero)


def _extended(labels: _Labels, place: int, mode: Mode, error: float, cost: int, objective: Objective) -> _Labels:
    count = len(labels.cost)
    total = labels.error + error if objective == "sum" else np.maximum(labels.error, error)
    made = np.full(count, MODES.index(mode))
    return _Labels(labels.cost + cost, total, made, np.full(count, place), np.arange(count))


def _pruned(ways: Sequence[_Labels]) -> _Labels:
    """Those that nothing is better than, cheapest first; of equal ones the first."""
    fields = [
        np.concatenate(own) for own in zip(*((w.cost, w.error, w.mode, w.state, w.label) for w in ways), strict=True)
    ]
    order = np.lexsort((fields[1], fields[0]))
    error = fields[1][order]
    least = np.minimum.accumulate(error)
    better = np.concatenate(([True], error[1:] < least[:-1]))
    return _Labels(*(values[order[better]] for values in fields))


def _traced(reached: Sequence[Mapping[_State, _Labels]], states: Sequence[_State], best: _Labels, k: int) -> Found:
    """The modes that lead to a label of the end."""
    modes: list[Mode] = []
    state, label = states[int(best.state[k])], int(best.label[k])
    for i in range(len(reached) - 1, 0, -1):
        own = reached[i][state]
        modes.append(MODES[int(own.mode[label])])
        state, label = list(reached[i - 1])[int(own.state[label])], int(own.label[label])
    return Found(tuple(reversed(modes)), int(best.cost[k]), float(best.error[k]))
