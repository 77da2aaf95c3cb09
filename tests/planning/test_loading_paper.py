"""The published rule in the simulator: its formulas for equal blocks, exactly; and what its figures determine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_runs import check, runs, uniform

from toolchain.planning.loading.paper import paper_schedule, saved_s
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.simulate import simulate
from toolchain.planning.loading.unrolled import unroll
from toolchain.planning.loading.writing import write

SECONDS = st.integers(1, 40).map(lambda n: n / 8)
LOSSES = st.sampled_from([0.0, 0.125, 0.5, 1.0])


def simulated_s(blocks: int, load: float, compute: float, resident: int, passes: int, loss: float) -> float:
    """What the rule takes with bytes for ``resident`` blocks, the one that runs and the next, but not for all."""
    run = uniform(blocks, load, compute, passes)
    budget = 10 * (resident + 2)
    u = unroll(run)
    plan = write(u, paper_schedule(u, budget), budget)
    timeline = simulate(run, plan, loss)
    check(run, plan, timeline)
    return timeline.total_s


@given(blocks=st.integers(3, 9), load=SECONDS, compute=SECONDS, passes=st.integers(1, 5), loss=LOSSES)
@settings(max_examples=40, deadline=None)
def test_nothing_resident(blocks: int, load: float, compute: float, passes: int, loss: float) -> None:
    """Equation 10 for every pass; but the very first load is hidden behind nothing."""
    shorter = min(load, compute)
    saved = passes * saved_s(blocks, load, compute, 0, loss * blocks * shorter) - (1 - loss) * shorter
    expected = passes * blocks * (load + compute) - saved
    assert simulated_s(blocks, load, compute, 0, passes, loss) == pytest.approx(expected, rel=1e-12)


@given(data=st.data(), blocks=st.integers(4, 9), load=SECONDS, compute=SECONDS, passes=st.integers(2, 5), loss=LOSSES)
@settings(max_examples=40, deadline=None)
def test_leading_blocks_resident(
    data: st.DataObject, blocks: int, load: float, compute: float, passes: int, loss: float
) -> None:
    """Equation 11 for every pass but the first, which has to load the resident blocks, too."""
    resident = data.draw(st.integers(1, blocks - 3))
    shorter = min(load, compute)
    lost = loss * blocks * shorter
    saved = (blocks - 1) * (1 - loss) * shorter + (passes - 1) * saved_s(blocks, load, compute, resident, lost)
    expected = passes * blocks * (load + compute) - saved
    assert simulated_s(blocks, load, compute, resident, passes, loss) == pytest.approx(expected, rel=1e-12)


def test_published_savings_follow_from_one_reading_of_them() -> None:
    """STDiT 1000 → 750 s and T5 164 → 137 s with 28 and 24 blocks, none resident, no loss, loads shorter than calls."""
    for blocks, passes, serial, concurrent in ((28, 30, 1000.0, 750.0), (24, 1, 164.0, 137.0)):
        load = (serial - concurrent) / (blocks * passes - 1)
        compute = serial / (blocks * passes) - load
        assert load < compute
        assert simulated_s(blocks, load, compute, 0, passes, 0.0) == pytest.approx(concurrent, rel=1e-12)


def test_published_savings_follow_from_other_readings_as_well() -> None:
    """The figures do not determine load time and loss: loads as long as calls do it, too."""
    blocks, passes = 28, 30
    each = 1000.0 / (2 * blocks * passes)
    loss = 1 - 250.0 / ((blocks * passes - 1) * each)
    assert simulated_s(blocks, each, each, 0, passes, loss) == pytest.approx(750.0, rel=1e-12)


@given(data=st.data(), run=runs(most_blocks=8, most_calls=40, most_times=6))
@settings(max_examples=40, deadline=None)
def test_the_rule_holds_its_budget(data: st.DataObject, run: Run) -> None:
    u = unroll(run)
    budget = data.draw(st.integers(u.least_budget, u.least_budget + sum(u.size)))
    schedule = paper_schedule(u, budget)
    plan = write(u, schedule, budget)
    timeline = simulate(run, plan)
    check(run, plan, timeline)
    assert timeline.total_s == pytest.approx(schedule.finish_s, rel=1e-12)
