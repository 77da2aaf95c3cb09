"""The choice of one option of every item within a limit: held against trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.planning.allocation import CLOSE, Option, UnreachableError, allocate, frontier

OPTION = st.builds(Option, st.integers(0, 12), st.integers(0, 20).map(float))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def best(items: list[list[Option]], limit: float) -> float | None:
    every = itertools.product(*items)
    return min((sum(o.value for o in c) for c in every if sum(o.cost for o in c) <= limit), default=None)


@given(items=ITEMS, limit=st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_it_is_the_best_there_is(items: list[list[Option]], limit: int) -> None:
    truth = best(items, limit)
    if truth is None:
        with pytest.raises(UnreachableError) as error:
            allocate(items, limit)
        assert error.value.least == sum(min(o.cost for o in options) for options in items)
        return
    found = allocate(items, limit)
    taken = [options[k] for options, k in zip(items, found.chosen, strict=True)]
    assert sum(o.cost for o in taken) == found.cost <= limit
    assert sum(o.value for o in taken) == found.value
    assert found.value <= truth * (1 + 2 * CLOSE)
    assert found.bound <= truth + 1e-12
    assert found.gap <= 2 * CLOSE
    assert allocate(items, limit) == found


@given(items=ITEMS, limit=st.integers(0, 60), states=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_a_search_cut_short_knows_how_far_it_may_be_off(items: list[list[Option]], limit: int, states: int) -> None:
    truth = best(items, limit)
    if truth is None:
        return
    found = allocate(items, limit, most_states=states)
    assert found.cost <= limit
    assert found.bound <= truth + 1e-12 <= found.value + 1e-9


@given(items=ITEMS)
@settings(max_examples=100, deadline=None)
def test_the_frontier_is_of_best_choices(items: list[list[Option]]) -> None:
    points = frontier(items)
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    for cost, value in points:
        truth = best(items, cost + 1e-9)
        assert truth is not None
        assert value == pytest.approx(truth, abs=1e-9)


def test_sizes_of_a_real_model() -> None:
    rng = random.Random(0)
    items = []
    for _ in range(400):
        numbers, scale = rng.choice([1152 * 1152, 1152 * 3456, 1152 * 4608]), 10 ** rng.uniform(-4, 0)
        bits = {16.0: 0.0} | {b: scale * 4.0**-b * rng.uniform(0.7, 1.4) for b in (8.0, 6.0, 4.6, 4.3, 4.0, 3.0, 2.0)}
        items.append([Option(int(numbers * b / 8), value) for b, value in bits.items()])
    limit = sum(max(o.cost for o in options) for options in items) * 0.3
    found = allocate(items, limit)
    assert found.gap <= 2 * CLOSE
    assert 0.999 * limit < found.cost <= limit
