"""How functions are called that passes make of others: of both halves of guidance, of all denoising steps.

Nothing here needs torch.
"""

from __future__ import annotations

import re


def conditional(function: str) -> str:
    """The name of what ``function`` computes, for the conditional half of guidance alone."""
    return f"{function}_conditional"


def grouped(function: str, group: int) -> str:
    """The name of a function for a group of steps, which count from 0: the first is the function itself."""
    return function if group == 0 else f"{function}_{group + 1}"


def ungrouped(name: str) -> str:
    """The function that :func:`grouped` gave a name to."""
    return re.sub(r"_[1-9][0-9]*$", "", name)
