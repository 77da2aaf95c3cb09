"""tanh-GELU in forms that are equal to it in arithmetic and that converters keep.

Both Core ML's converter and XNNPACK read ``gelu(approximate="tanh")`` as the exact GELU, which is off by
up to 5e-4.
"""

from __future__ import annotations

import math

import torch

from toolchain.ir.contracts import GeluLeaf
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf


def gelu_formula(x: torch.Tensor) -> torch.Tensor:
    """Written out. Core ML's converter recognises the formula and makes one operator of it."""
    return x * (0.5 * (torch.tanh((0.044715 * torch.pow(x, 3) + x) * math.sqrt(2 / math.pi)) + 1))


def gelu_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``x · σ(√(8/π) (x + 0.044715 x³))``: XNNPACK has no third power; this it takes whole, as fast as its own GELU."""
    return x * torch.sigmoid(x * (1 + 0.044715 * (x * x)) * math.sqrt(8 / math.pi))


def _make_formula(leaf: Leaf) -> LegalLeaf | None:
    return LegalLeaf(leaf.changed(gelu=gelu_formula)) if isinstance(leaf, GeluLeaf) else None


def _make_sigmoid(leaf: Leaf) -> LegalLeaf | None:
    return LegalLeaf(leaf.changed(gelu=gelu_sigmoid)) if isinstance(leaf, GeluLeaf) else None


GELU_FORMULA = LegalForm("gelu-formula", GeluLeaf.trait, _make_formula)
GELU_SIGMOID = LegalForm("gelu-sigmoid", GeluLeaf.trait, _make_sigmoid)
