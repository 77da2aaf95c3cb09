"""Which of several ways to keep each weight, so that all of them together cost least and stay within a limit.

This is the multiple-choice knapsack: one option of every item, the sum of ``values`` least, the sum of ``costs`` at
most a limit. Its relaxation, in which an item may be a mixture of two options, is solved by taking steps along each
item's convex hull in the order of what they gain for what they cost; it bounds every other solution from below. What
lies between is searched by dynamic programming over partial sums, of which those are kept that no other beats and
whose bound beats the best solution known (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CLOSE = 1e-9
"""A solution this near to the bound, relatively, is called the best one: sums of floats are no more exact."""
MOST_STATES = 100_000
"""Partial sums that are looked at; what is left out of more widens the gap that is reported."""


@dataclass(frozen=True)
class Option:
    """One way to keep a weight: what it costs and how bad it is; neither is negative."""

    cost: float
    value: float


@dataclass(frozen=True)
class Allocation:
    """The option taken of each item, by index, and their sums.

    No solution has a value under ``bound``. ``value`` is at most a billionth above it, relatively, unless the search
    was cut short.
    """

    chosen: tuple[int, ...]
    cost: float
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """How much less, relatively, the best value could be at most."""
        return max(0.0, 1 - self.bound / self.value) if self.value > 0 else 0.0


class UnreachableError(Exception):
    """No choice of options is within the limit; ``least`` is the least sum of costs there is."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the least is {least}")
        self.least = least


def allocate(items: Sequence[Sequence[Option]], limit: float, most_states: int = MOST_STATES) -> Allocation:
    """One option of every item: the least sum of values with a sum of costs of at most ``limit``.

    The same arguments give the same answer, of several that are as good always the same one.

    Args:
        most_states: partial sums to look at; fewer are faster and may leave a gap.

    Raises:
        UnreachableError: even the cheapest options together cost more.
    """
    hulls = [_hull(options) for options in items]
    least = _total([items[i][hull[0]].cost for i, hull in enumerate(hulls)])
    if least > limit:
        raise UnreachableError(least)
    greedy = _greedy(items, hulls, limit)
    return _search(items, hulls, limit, greedy, most_states)


def frontier(items: Sequence[Sequence[Option]]) -> list[tuple[float, float]]:
    """Costs and values of the best choices at the limits where the relaxation needs no mixtures, cheapest first."""
    hulls = [_hull(options) for options in items]
    points = [
        (
            _total([items[i][hull[0]].cost for i, hull in enumerate(hulls)]),
            _total([items[i][hull[0]].value for i, hull in enumerate(hulls)]),
        )
    ]
    for step in _steps(items, hulls):
        points.append((points[-1][0] + step.cost, max(0.0, points[-1][1] - step.gain)))
    return points


@dataclass(frozen=True)
class _Step:
    """From a place on an item's hull to the next."""

    item: int
    to: int
    cost: float
    gain: float


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull, by rising cost and falling value."""
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].value, i))
    hull: list[int] = []
    for i in order:
        new = options[i]
        if hull and new.value >= options[hull[-1]].value:
            continue
        while len(hull) > 1 and _slope(options[hull[-2]], options[hull[-1]]) <= _slope(options[hull[-1]], new):
            hull.pop()
        hull.append(i)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (a.value - b.value) / (b.cost - a.cost)


def _steps(items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """All steps along the hulls, the most gain for its cost first; an item's own come in their order."""
    steps = []
    for i, hull in enumerate(hulls):
        for place in range(1, len(hull)):
            a, b = items[i][hull[place - 1]], items[i][hull[place]]
            steps.append(_Step(i, place, b.cost - a.cost, a.value - b.value))
    return sorted(steps, key=lambda s: (-s.gain / s.cost, s.item, s.to))


def _greedy(items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], limit: float) -> tuple[int, ...]:
    """Steps in their order as long as they fit; where one does not, its item takes no more."""
    places = [0] * len(items)
    spent = _total([items[i][hull[0]].cost for i, hull in enumerate(hulls)])
    for step in _steps(items, hulls):
        if places[step.item] == step.to - 1 and spent + step.cost <= limit:
            places[step.item] = step.to
            spent += step.cost
    return tuple(hull[place] for hull, place in zip(hulls, places, strict=True))


def _search(
    items: Sequence[Sequence[Option]],
    hulls: Sequence[Sequence[int]],
    limit: float,
    known: tuple[int, ...],
    most_states: int,
) -> Allocation:
    """Dynamic programming over the items, those with the widest range of costs first."""
    order = sorted(range(len(items)), key=lambda i: (min(o.cost for o in items[i]) - max(o.cost for o in items[i]), i))
    rests = _rests(items, hulls, order)
    best = _value(items, known)
    left_out = np.inf
    costs, values = np.zeros(1), np.zeros(1)
    back: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for stage, i in enumerate(order):
        options = items[i]
        sums = np.add.outer([o.cost for o in options], costs).ravel()
        worths = np.add.outer([o.value for o in options], values).ravel()
        bounds = worths + _bound(rests[stage + 1], limit - sums)
        kept = np.flatnonzero(bounds < best * (1 - CLOSE))
        kept = kept[np.lexsort((worths[kept], sums[kept]))]
        falling = np.minimum.accumulate(worths[kept])
        kept = kept[np.concatenate([[True], worths[kept][1:] < falling[:-1]])] if len(kept) else kept
        if len(kept) > most_states:
            ranked = kept[np.argsort(bounds[kept], kind="stable")]
            left_out = min(left_out, float(bounds[ranked[most_states]]))
            kept = np.sort(ranked[:most_states])
        taken, parents = np.divmod(kept, len(costs))
        back.append((taken, parents))
        costs, values = sums[kept], worths[kept]
    chosen = list(known)
    if len(values):
        at = int(np.argmin(values))
        for stage in range(len(order) - 1, -1, -1):
            taken, parents = back[stage]
            chosen[order[stage]], at = int(taken[at]), int(parents[at])
    value = _value(items, chosen)
    cost = _total([options[k].cost for options, k in zip(items, chosen, strict=True)])
    # what was not kept had a bound no better than the best by more than CLOSE, or was left out
    relaxed = float(_bound(rests[0], np.array([limit]))[0])
    bound = max(relaxed, min(left_out, value * (1 - CLOSE)))
    return Allocation(tuple(chosen), cost, value, min(bound, value))


def _rests(
    items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], order: Sequence[int]
) -> list[tuple[Floats, Floats]]:
    """The relaxation of the items from each stage on: least values (second) at limits (first), linear between them."""
    rests = []
    steps = _steps(items, hulls)
    for stage in range(len(order) + 1):
        left = set(order[stage:])
        base = [items[i][hulls[i][0]] for i in order[stage:]]
        own = [s for s in steps if s.item in left]
        costs = np.cumsum([_total([o.cost for o in base]), *(s.cost for s in own)])
        values = _total([o.value for o in base]) - np.cumsum([0.0, *(s.gain for s in own)])
        rests.append((costs, np.maximum(values, 0.0)))
    return rests


def _bound(rest: tuple[Floats, Floats], room: Floats) -> Floats:
    costs, values = rest
    slack = CLOSE * max(1.0, abs(float(costs[-1]))) * 1e-3  # sums in another order differ in their last digits
    return np.where(room < costs[0] - slack, np.inf, np.interp(room, costs, values))


def _value(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return _total([options[k].value for options, k in zip(items, chosen, strict=True)])


def _total(numbers: Sequence[float]) -> float:
    return float(sum(numbers))
