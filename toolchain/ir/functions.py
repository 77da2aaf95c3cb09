"""How functions are called that are there once for each group of denoising steps. Nothing here needs torch."""

from __future__ import annotations

import re


def grouped(function: str, group: int) -> str:
    """The name of a function for a group of steps, which count from 0: the first is the function itself."""
    return function if group == 0 else f"{function}_{group + 1}"


def ungrouped(name: str) -> str:
    """The function that :func:`grouped` gave a name to."""
    return re.sub(r"_[1-9][0-9]*$", "", name)
