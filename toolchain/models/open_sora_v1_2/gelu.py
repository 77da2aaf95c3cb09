"""tanh-GELU in the forms that targets need. They are equal; converters are not.

Both Core ML's converter and XNNPACK read ``gelu(approximate="tanh")`` as the exact GELU, which is off by
up to 5e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F


def gelu_operator(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_formula(x: torch.Tensor) -> torch.Tensor:
    """Written out. Core ML's converter recognises the formula and makes one operator of it."""
    return x * (0.5 * (torch.tanh((0.044715 * torch.pow(x, 3) + x) * math.sqrt(2 / math.pi)) + 1))


def gelu_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``x · σ(√(8/π) (x + 0.044715 x³))``: the same, in operators that XNNPACK delegates."""
    return x * torch.sigmoid(x * (1 + 0.044715 * (x * x)) * math.sqrt(8 / math.pi))


GELUS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": gelu_operator,
    "gelu-formula": gelu_formula,
    "gelu-sigmoid": gelu_sigmoid,
}
"""By legalisation rule; a leaf holds the rule's name."""
