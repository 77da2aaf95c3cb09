"""The planner of loads: within the budget, as fast as anything can be, never slower than the published rule."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_runs import check, faster_plan_s, runs, uniform

from toolchain.errors import RecipeError
from toolchain.planning.loading import exact
from toolchain.planning.loading.bound import lower_bound_s
from toolchain.planning.loading.planner import plan_loading
from toolchain.planning.loading.run import Block, Call, Phase, Run
from toolchain.planning.loading.simulate import simulate
from toolchain.planning.loading.unrolled import unroll

LOSSES = st.sampled_from([0.0, 0.0, 0.25, 1.0])
ROUNDING = 1e-9
LARGER = runs(most_blocks=11, most_calls=60, most_times=6)
"""Mostly too large to be solved exactly."""


def some_budget(data: st.DataObject, run: Run) -> int:
    """From what a run needs at least to what keeps everything."""
    least = unroll(run).least_budget
    return data.draw(st.integers(least, least + sum(b.weight_bytes for b in run.blocks)))


@given(data=st.data(), run=runs(), loss=LOSSES)
@settings(max_examples=80, deadline=None)
def test_small_runs_are_planned_as_well_as_can_be(data: st.DataObject, run: Run, loss: float) -> None:
    budget = some_budget(data, run)
    planned = plan_loading(run, budget, loss)
    assert faster_plan_s(run, budget, loss, planned.total_s * (1 - ROUNDING)) is None
    assert planned.gap == 0


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_eight_blocks_are_planned_as_well_as_can_be(data: st.DataObject) -> None:
    seconds = st.integers(1, 12).map(float)
    blocks = tuple(Block(f"b{i}", data.draw(st.integers(2, 9)), data.draw(seconds)) for i in range(8))
    step = [Call(b.name, "base", data.draw(seconds)) for b in blocks]
    again = data.draw(st.integers(0, 3))
    run = Run(blocks, (Phase("step", tuple(step)), Phase("again", (*step[:again], step[0]))))
    budget = unroll(run).least_budget + data.draw(st.integers(0, 5))  # more, and trying everything takes too long
    planned = plan_loading(run, budget)
    assert faster_plan_s(run, budget, 0.0, planned.total_s * (1 - ROUNDING)) is None


@given(data=st.data(), run=st.one_of(runs(), LARGER), loss=LOSSES)
@settings(max_examples=80, deadline=None)
def test_a_plan_holds_when_it_is_followed(data: st.DataObject, run: Run, loss: float) -> None:
    planned = plan_loading(run, some_budget(data, run), loss)
    timeline = simulate(run, planned.plan, loss)
    check(run, planned.plan, timeline)
    assert timeline.total_s == pytest.approx(planned.total_s, rel=ROUNDING)
    assert planned.bound_s <= planned.total_s <= planned.paper_s * (1 + ROUNDING)


@given(data=st.data(), run=LARGER)
@settings(max_examples=15, deadline=None)
def test_memory_does_not_depend_on_how_long_things_really_take(data: st.DataObject, run: Run) -> None:
    plan = plan_loading(run, some_budget(data, run)).plan
    real = st.floats(0, 20)
    blocks = tuple(dataclasses.replace(b, load_s=data.draw(real)) for b in run.blocks)
    phases = tuple(
        dataclasses.replace(p, calls=tuple(dataclasses.replace(c, compute_s=data.draw(real)) for c in p.calls))
        for p in run.phases
    )
    other = Run(blocks, phases)
    check(other, plan, simulate(other, plan))


@given(data=st.data(), run=st.one_of(runs(), LARGER), loss=LOSSES)
@settings(max_examples=50, deadline=None)
def test_more_memory_is_never_slower(data: st.DataObject, run: Run, loss: float) -> None:
    less, more = sorted((some_budget(data, run), some_budget(data, run)))
    assert plan_loading(run, more, loss).total_s <= plan_loading(run, less, loss).total_s * (1 + ROUNDING)


@given(data=st.data(), run=runs(), loss=LOSSES)
@settings(max_examples=80, deadline=None)
def test_nothing_beats_the_bound_of_runs_too_large_to_solve(data: st.DataObject, run: Run, loss: float) -> None:
    budget = some_budget(data, run)
    bound = lower_bound_s(unroll(run), budget, loss)
    assert faster_plan_s(run, budget, loss, bound * (1 - ROUNDING)) is None


@given(run=runs(most_blocks=3, most_calls=6))
@settings(max_examples=40, deadline=None)
def test_one_byte_less_than_the_least_budget_is_refused_by_name(run: Run) -> None:
    u = unroll(run)
    plan_loading(run, u.least_budget)
    assert faster_plan_s(run, u.least_budget - 1, 0.0, math.inf) is None
    with pytest.raises(RecipeError, match=rf"needs {u.least_budget} bytes") as error:
        plan_loading(run, u.least_budget - 1)
    named = next(c for c in u.calls if f"'{c.block}' ({c.function})" in str(error.value))
    at = [i for i, c in enumerate(u.calls) if (c.block, c.function) == (named.block, named.function)]
    assert max(u.room[i] + u.size[u.block[i]] for i in at) == u.least_budget


def test_blocks_that_stay_are_spread_so_that_the_loader_never_rests() -> None:
    run = uniform(20, load_s=2.0, compute_s=1.0, times=10)
    planned = plan_loading(run, 10 * (10 + 2))
    rounds = [30.0] * 9  # published: 10 streamed blocks take 2 s each, 10 resident ones 1 s
    assert planned.paper_s == 2.0 + 19 * 2.0 + 1.0 + sum(rounds)
    steady = (planned.total_s - (2.0 + 19 * 2.0 + 1.0)) / 9
    assert steady <= 20.5, "every round computes for 20 s, and loads 10 blocks of 2 s meanwhile"


def test_the_next_component_is_loaded_while_the_last_one_runs() -> None:
    blocks = (Block("text", 4, 1.0), Block("a", 4, 6.0), Block("b", 2, 3.0))
    phases = (
        Phase("prompt", (Call("text", "base", 9.0),)),
        Phase("step", (Call("a", "f", 1.0), Call("b", "f", 1.0)), 5),
    )
    planned = plan_loading(Run(blocks, phases), 10)
    assert planned.total_s == 1.0 + 9.0 + 10 * 1.0


def test_a_smaller_block_may_overtake_a_larger_one_that_has_to_wait() -> None:
    blocks = (Block("x", 6, 1.0), Block("large", 5, 1.0), Block("small", 4, 5.0))
    run = Run(blocks, (Phase("all", (Call("x", "f", 5.0), Call("large", "f", 1.0), Call("small", "f", 5.0))),))
    planned = plan_loading(run, 10)
    assert [s.block for s in simulate(run, planned.plan).loads] == ["x", "small", "large"]
    assert planned.total_s == 1.0 + 5.0 + 1.0 + 1.0 + 5.0


def test_repetition_stays_folded() -> None:
    run = uniform(20, load_s=1.0, compute_s=1.0, times=100)
    planned = plan_loading(run, 10 * 30)
    assert [(s.times, len(s.events)) for s in planned.plan.sections] == [(1, 40), (98, 20), (1, 40)]
    tight = plan_loading(run, 10 * 2)
    assert sum(len(s.events) for s in tight.plan.sections) < 300


def test_an_exact_search_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders of loads grow as factorials; what is found then is no proven best, and says so."""
    numbers = random.Random(1)
    blocks = tuple(Block(f"b{i}", numbers.randint(1, 9), numbers.uniform(0.5, 6)) for i in range(8))
    run = Run(blocks, (Phase("step", tuple(Call(b.name, "base", numbers.uniform(0.5, 6)) for b in blocks), 2),))
    budget = sum(b.weight_bytes for b in blocks) // 2
    monkeypatch.setattr(exact, "MOST_COMPARISONS", 1000)
    planned = plan_loading(run, budget)
    assert planned.bound_s < planned.total_s <= planned.paper_s
    assert simulate(run, planned.plan).peak_bytes <= budget
