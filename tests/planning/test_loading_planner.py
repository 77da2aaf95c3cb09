"""The planner of loads: within the budget, as fast as anything can be, never slower than the published rule."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading_runs import brute_force, check, runs, uniform

from toolchain.errors import RecipeError
from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.planner import plan_loading
from toolchain.planning.loading.run import Block, Call, Phase, Run
from toolchain.planning.loading.simulate import simulate
from toolchain.planning.loading.unrolled import unroll

LOSSES = st.sampled_from([0.0, 0.0, 0.25, 1.0])
ROUNDING = 1e-9


def budgets(run: Run) -> st.SearchStrategy[int]:
    """From what a run needs at least to what keeps everything."""
    least = unroll(run).least_budget
    return st.integers(least, least + sum(b.weight_bytes for b in run.blocks))


@given(data=st.data(), run=runs(), loss=LOSSES)
@settings(max_examples=150, deadline=None)
def test_it_is_the_best_there_is(data: st.DataObject, run: Run, loss: float) -> None:
    budget = data.draw(budgets(run))
    planned = plan_loading(run, budget, loss)
    assert planned.total_s == pytest.approx(brute_force(run, budget, loss), rel=ROUNDING)
    assert planned.gap == 0
