"""The search for schedules against trying every one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.errors import RecipeError
from toolchain.formats.reuse import Difference, check_reuse
from toolchain.formats.schedule import Step
from toolchain.planning.step_search import MODES, Mode, Objective, StepErrors, search


def as_steps(modes: tuple[Mode, ...]) -> list[Step]:
    return [
        Step(
            i,
            0.0,
            0.0,
            guidance="conditional" if mode.endswith("conditional") else "both",
            reuse="range" if mode.startswith("reuse") else None,
        )
        for i, mode in enumerate(modes)
    ]


def allowed(modes: tuple[Mode, ...], difference: Difference) -> bool:
    try:
        check_reuse(as_steps(modes), {"range": {"block"}}, difference)
    except RecipeError:
        return False
    return True


def error_of(modes: tuple[Mode, ...], errors: StepErrors, difference: Difference) -> list[float]:
    """The error of each step, by its definition."""
    found = []
    for j, mode in enumerate(modes):
        computed = max(i for i in range(j + 1) if not modes[i].startswith("reuse"))
        both = max((i for i in range(j + 1) if not modes[i].endswith("conditional")), default=-1)
        if mode == "both":
            found.append(0.0)
        elif mode == "reuse":
            found.append(errors.reused[computed, j])
        elif difference == "none":
            found.append(errors.alone[computed, j])
        else:
            found.append(errors.kept[computed, both, j])
    return found


def random_errors(n: int, seed: int) -> StepErrors:
    rng = np.random.default_rng(seed)
    return StepErrors(rng.random((n, n)), rng.random((n, n)), rng.random((n, n, n)))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    seed=st.integers(0, 1000),
    difference=st.sampled_from(["none", "last"]),
    objective=st.sampled_from(["sum", "largest"]),
    costs=st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=5, max_size=5),
    modes=st.sets(st.sampled_from(MODES)),
)
def test_nothing_is_better(
    n: int, seed: int, difference: Any, objective: Objective, costs: list[list[int]], modes: set[Mode]
) -> None:
    errors = random_errors(n, seed)
    own = [dict(zip(MODES, c, strict=True)) for c in costs[:n]]
    found = search(errors, own, difference, modes=modes, objective=objective)
    combine = sum if objective == "sum" else max
    every = {
        tried: (sum(c[m] for c, m in zip(own, tried, strict=True)), combine(error_of(tried, errors, difference)))
        for tried in itertools.product({"both", *modes}, repeat=n)
        if allowed(tried, difference)
    }
    for f in found:
        assert (f.cost, f.error) == pytest.approx(every[f.modes])
    front = []
    for cost, error in sorted(set(every.values())):
        if not front or error < front[-1][1] - 1e-12:
            front.append((cost, error))
    assert [(f.cost, f.error) for f in reversed(found)] == [(c, pytest.approx(e)) for c, e in front]


def test_thirty_steps_in_all_modes() -> None:
    """The size of a real one; costs that no two sums of are equal."""
    costs: list[dict[Mode, int]] = [dict(zip(MODES, (1000, 613, 97, 61), strict=True))] * 30
    found = search(random_errors(30, 1), costs, "last")
    assert found[0].modes == ("both",) * 30
    assert [f.cost for f in found] == sorted((f.cost for f in found), reverse=True)
    assert all(allowed(f.modes, "last") for f in found)
