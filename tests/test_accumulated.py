"""The rule that leaves a range out until enough has changed before it, against its words in plain numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from toolchain.errors import RecipeError
from toolchain.formats.reuse import Accumulated
from toolchain.formats.schedule import plan_steps
from toolchain.player.accumulated import AccumulatedState


def by_the_words(
    values: list[np.ndarray[Any, Any]], threshold: float, polynomial: list[float], first: int, last: int
) -> tuple[list[bool], float]:
    """Which steps compute, and how near the sum came to the threshold."""
    computes, total, nearest = [], 0.0, math.inf
    for i, x in enumerate(values):
        if i:
            rows = min(len(x), len(values[i - 1]))
            before = values[i - 1][:rows].astype(np.float64)
            change = np.mean(np.abs(x[:rows] - before)) / np.mean(np.abs(before))
            total += float(np.polyval(polynomial, change))
        if i < first or i >= len(values) - last:
            computes.append(True)
        else:
            computes.append(not total < threshold)
            nearest = min(nearest, abs(total - threshold))
        if computes[-1]:
            total = 0.0
    return computes, nearest


@given(
    steps=st.integers(3, 30),
    seed=st.integers(0, 2**16),
    threshold=st.floats(0.01, 3.0),
    polynomial=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    first=st.integers(1, 4),
    last=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_it_does_what_its_words_say(
    steps: int, seed: int, threshold: float, polynomial: list[float], first: int, last: int
) -> None:
    random = np.random.default_rng(seed)
    rows = random.integers(1, 3, steps)
    values = [np.cumsum(random.normal(size=(n, 3, 2)), 0).astype(np.float32) for n in rows]
    computes, nearest = by_the_words(values, threshold, polynomial, first, last)
    rule = Accumulated(threshold=threshold, polynomial=polynomial, first=first, last=last)
    state = AccumulatedState(rule, steps)
    found = [not state.leaves_out(i, torch.from_numpy(x)) for i, x in enumerate(values)]
    if nearest > 1e-4:  # or else rounding decides
        assert found == computes
    assert all(rule.may_leave_out(i, steps) for i, own in enumerate(found) if not own)
    kept = rule.kept_after(steps)
    assert all(kept[i - 1] for i, own in enumerate(found) if not own)
    assert not kept[-1]


def test_what_does_not_change_is_left_out_until_the_last() -> None:
    state = AccumulatedState(Accumulated(threshold=0.1, first=2), 6)
    assert [state.leaves_out(i, torch.ones(2, 3)) for i in range(6)] == [False, False, True, True, True, False]


def test_changes_add_up() -> None:
    """Each is 0.25; two of them are not below a half."""
    state = AccumulatedState(Accumulated(threshold=0.5), 8)
    found = [state.leaves_out(i, torch.full((1, 2), 1.25**i)) for i in range(8)]
    assert found == [False, True, False, True, False, True, False, False]


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]], ids=str)
def test_what_is_not_a_number_is_computed(values: list[float]) -> None:
    state = AccumulatedState(Accumulated(threshold=9.0, last=0), 3)
    assert not any(state.leaves_out(i, torch.tensor([v])) for i, v in enumerate(values))


def test_it_is_for_one_video() -> None:
    state = AccumulatedState(Accumulated(threshold=1.0), 3)
    state.leaves_out(0, torch.ones(1))
    with pytest.raises(ValueError, match="step 0 observed, but expected 1"):
        state.leaves_out(0, torch.ones(1))


def test_what_was_observed_may_be_changed_afterwards() -> None:
    state, value = AccumulatedState(Accumulated(threshold=0.5, last=0), 2), torch.ones(1, 2)
    state.leaves_out(0, value)
    value += 1
    assert not state.leaves_out(1, value), "it has doubled"


def test_a_rule_that_saves_nothing() -> None:
    steps = plan_steps((1000.0, 600.0, 300.0))
    Accumulated(threshold=0.1).check(steps)
    with pytest.raises(RecipeError, match=r"^reuse\.rule: the first 2 and the last 1 of 3 denoiser calls compute all"):
        Accumulated(threshold=0.1, first=2).check(steps)


def test_both_halves_after_the_conditional_one() -> None:
    times = (1000.0, 600.0, 300.0, 100.0)
    rule = Accumulated(threshold=0.1)
    rule.check(plan_steps(times, conditional_steps=[2, 3]))
    rule.check(plan_steps(times, conditional_steps=[2]))  # the last computes in any case
    with pytest.raises(RecipeError, match=r"^reuse\.rule: step 2 computes both halves of guidance after"):
        rule.check(plan_steps(times, conditional_steps=[1]))


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"first": 0}, {"last": -1}, {"polynomial": []}, {"power": 1}])
def test_numbers_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Accumulated.model_validate({"threshold": 0.1} | wrong)
