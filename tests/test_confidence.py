"""Bounds that are said to hold with some confidence do."""

from __future__ import annotations

import random
import statistics

import pytest

from toolchain.accuracy.confidence import lower_bound, t_quantile


@pytest.mark.parametrize(
    ("freedom", "table", "near"),
    [(1, 3.0777, 0.04), (2, 1.8856, 0.01), (3, 1.6377, 0.003), (7, 1.4149, 1e-3), (30, 1.3104, 1e-3)],
)
def test_quantiles_of_students_t(freedom: int, table: float, near: float) -> None:
    assert t_quantile(0.9, freedom) == pytest.approx(table, rel=near)
    assert t_quantile(0.5, freedom) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("count", [3, 16])
def test_a_bound_holds_as_often_as_it_says(count: int) -> None:
    rng = random.Random(0)
    below = [lower_bound([rng.gauss(40.0, 5.0) for _ in range(count)], 0.9) <= 40.0 for _ in range(4000)]
    assert statistics.fmean(below) == pytest.approx(0.9, abs=0.015)


def test_what_does_not_differ_is_the_bound() -> None:
    assert lower_bound([200.0, 200.0], 0.9) == 200.0
