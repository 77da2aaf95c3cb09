"""What a few measurements say of others like them: a lower bound of the mean, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def lower_bound(values: Sequence[float], confidence: float) -> float:
    """What the mean of measurements like ``values`` is at least, with this confidence: mean - t · s / √n.

    It is exact for normally distributed ones; two or more are needed to know how they differ.
    """
    n = len(values)
    return statistics.fmean(values) - t_quantile(confidence, n - 1) * statistics.stdev(values) / math.sqrt(n)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with so many degrees of freedom, by its expansion about the normal distribution's.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5. At a probability of 0.9 it is 4 % too low for one
    degree of freedom, 1 % for two, and right to 0.3 % from three on.
    """
    x = float(statistics.NormalDist().inv_cdf(probability))
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(term / freedom**k for k, term in enumerate(terms, 1))
