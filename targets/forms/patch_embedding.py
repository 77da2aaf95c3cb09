"""The patch embedding's weight stored as the matrix that it is: runtimes multiply it faster than they convolve."""

from __future__ import annotations

from torch import nn

from toolchain.ir.contracts import PatchEmbedLeaf
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf
from toolchain.ir.weights import WeightSource


def _make(leaf: Leaf) -> LegalLeaf | None:
    if not isinstance(leaf, PatchEmbedLeaf):
        return None
    if isinstance(leaf.proj, nn.Linear):
        return LegalLeaf(leaf)
    dim, pixels = leaf.proj.weight.flatten(1).shape
    linear = nn.Linear(pixels, dim, bias=leaf.proj.bias is not None, device="meta")
    sources = {f"proj.{k}": WeightSource((f"proj.{k}",), tuple(p.shape)) for k, p in linear.named_parameters()}
    return LegalLeaf(leaf.changed(proj=linear), sources)


PATCHES_BY_LINEAR = LegalForm("patches-by-linear", PatchEmbedLeaf.kind, _make)
