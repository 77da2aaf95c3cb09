"""The simulator against timelines worked out by hand, its law of overlap, and plans that are not for the run."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_runs import runs

from toolchain.errors import BundleError
from toolchain.planning.loading.events import Event, Execute, Free, Load, LoadingPlan, Section
from toolchain.planning.loading.planner import plan_loading
from toolchain.planning.loading.run import Block, Call, Phase, Run
from toolchain.planning.loading.simulate import simulate
from toolchain.planning.loading.unrolled import unroll

RUN = Run(
    (Block("a", 10, 2.0), Block("b", 20, 3.0)),
    (Phase("once", (Call("a", "f", 4.0, 5, 1), Call("b", "g", 1.0, 7, 2))),),
)
EVENTS: tuple[Event, ...] = (Load("a"), Load("b"), Execute("a", "f"), Free("a"), Execute("b", "g"), Free("b"))


def plan_of(*events: Event) -> LoadingPlan:
    return LoadingPlan(50, (Section(1, events),))


def test_a_timeline_worked_out_by_hand() -> None:
    timeline = simulate(RUN, plan_of(*EVENTS))
    assert [(s.block, s.start_s, s.end_s) for s in timeline.loads] == [("a", 0, 2), ("b", 2, 5)]
    assert [(s.block, s.start_s, s.end_s) for s in timeline.runs] == [("a", 2, 6), ("b", 6, 7)]
    assert timeline.stalls_s == (2, 0)
    assert timeline.memory == ((0, 10), (2, 36), (6, 29), (7, 0))
    assert (timeline.total_s, timeline.peak_bytes) == (7, 36)


def test_while_both_work_both_are_slower() -> None:
    timeline = simulate(RUN, plan_of(*EVENTS), overlap_loss=0.5)
    # b's 3 s of load take 4.5 s beside a, which has then done 3 of its 4 s
    assert [(s.start_s, s.end_s) for s in timeline.loads] == [(0, 2), (2, 6.5)]
    assert [(s.start_s, s.end_s) for s in timeline.runs] == [(2, 7.5), (7.5, 8.5)]


@given(data=st.data(), run=runs(most_blocks=6, most_calls=30, most_times=5), loss=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_overlap_lost_is_linear(data: st.DataObject, run: Run, loss: float) -> None:
    least = unroll(run).least_budget
    plan = plan_loading(run, data.draw(st.integers(least, least + sum(b.weight_bytes for b in run.blocks)))).plan
    loads = sum(run.by_name[e.block].load_s for e in plan.events() if isinstance(e, Load))
    expected = (1 - loss) * simulate(run, plan).total_s + loss * (run.compute_s + loads)
    assert simulate(run, plan, loss).total_s == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert LoadingPlan.from_data(json.loads(json.dumps(plan.to_data()))) == plan


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((Load("c"),), "event 0: loads 'c', which is no block"),
        ((Load("a"), Load("a")), "event 1: loads 'a', which is loaded already"),
        ((Free("a"),), "event 0: frees 'a', which is not loaded"),
        ((Load("a"), Free("a")), "event 1: frees 'a', which has not run since it was loaded"),
        ((Execute("a", "f"),), r"event 0: runs 'a' \(f\), which is not loaded"),
        ((Load("a"), Execute("a", "g")), r"event 1: runs 'a' \(g\), but the next call is 'a' \(f\)"),
        (EVENTS[:4], "ends after 1 calls"),
        ((*EVENTS, Execute("a", "f")), r"event 6: runs 'a' \(f\), but the run has ended"),
        ((*EVENTS, Load("a")), "loads 'a' at its end"),
    ],
)
def test_a_plan_that_is_not_for_the_run_is_refused(events: tuple[Event, ...], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        simulate(RUN, plan_of(*events))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"budget_bytes": 0}, "budget_bytes: expected a whole number"),
        ({"sections": None}, "a list of sections"),
        ({"other": 1}, "expected version"),
        ({"sections": [{"times": True, "events": []}]}, r"sections\.0\.times"),
        ({"sections": [{"times": 1, "events": [{"load": "a"}, {"lode": "a"}]}]}, r"sections\.0\.events\.1"),
    ],
)
def test_plain_data_that_is_no_plan_is_refused(change: dict[str, Any], message: str) -> None:
    data = copy.deepcopy(plan_of(*EVENTS).to_data()) | change
    with pytest.raises(BundleError, match=message):
        LoadingPlan.from_data(data)


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block 'a': load_s is nan"):
        Block("a", 1, math.nan)
    with pytest.raises(ValueError, match=r"call of 'a': compute_s is -1"):
        Call("a", "f", -1.0)
    with pytest.raises(ValueError, match=r"calls 'b', which is no block"):
        Run((Block("a", 1, 1.0),), (Phase("p", (Call("b", "f", 1.0),)),))
    with pytest.raises(ValueError, match=r"overlap_loss is 2"):
        simulate(RUN, plan_of(*EVENTS), 2)
