"""Python floats rounded to the width that other code computes in, so that its numbers are repeated bit for bit.

Nothing here needs torch, and the results are the same on every machine (torch's own float32 sqrt is, for some sizes,
an ulp off).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple


class Format(NamedTuple):
    precision: int  # bits of the significand, the hidden one included
    smallest: int  # exponent of the smallest step between two numbers
    largest: float = math.inf  # where a geometry can get there


FORMATS: Final[Mapping[str, Format]] = {
    "float32": Format(24, -149),
    "bfloat16": Format(8, -133),
    "float16": Format(11, -24, 65504.0),
}


def round_to(x: float, to: Format) -> float:
    """``x`` to the nearest number of a narrower format, ties to even; infinity above the largest.

    One ``+ - * / sqrt`` on a Python float and then this is the correctly rounded operation of the format:
    53 bits are more than twice its precision plus two, so rounding twice does no harm.
    """
    if x == 0 or not math.isfinite(x):
        return x
    step = max(math.frexp(x)[1] - to.precision, to.smallest)
    rounded = math.ldexp(round(math.ldexp(x, -step)), step)
    return rounded if rounded <= to.largest else math.inf


def float32(x: float) -> float:
    """``x`` rounded to float32, as a Python float."""
    return round_to(x, FORMATS["float32"])
