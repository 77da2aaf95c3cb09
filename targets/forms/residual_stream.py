"""A residual stream kept small enough for float16."""

from __future__ import annotations

from toolchain.ir.contracts import ResidualLeaf
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf

RESIDUAL_SCALE = 2.0**-6
"""Room for 4.2e6 instead of 65504. A power of two, so that scaling rounds nothing."""


def _make(leaf: Leaf) -> LegalLeaf | None:
    return LegalLeaf(leaf.changed(scale=RESIDUAL_SCALE)) if isinstance(leaf, ResidualLeaf) else None


SMALL_RESIDUAL_STREAM = LegalForm("small-residual-stream", ResidualLeaf.trait, _make)
