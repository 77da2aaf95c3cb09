"""Attention as batched matrix products of rank 3: XNNPACK delegates these, but no product of rank 4."""

from __future__ import annotations

import torch

from toolchain.ir.contracts import AttentionLeaf
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf


def attend_in_batches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As :func:`toolchain.ir.contracts.attend`, on ``[G·h, N, d]``."""
    g, n, heads, d = q.shape
    m = k.shape[1]
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    q = q.reshape(g * heads, n, d) * d**-0.5
    scores = torch.bmm(q, k.reshape(g * heads, m, d).transpose(1, 2))
    if bias is not None:
        scores = (scores.reshape(g, heads, n, m) + bias).reshape(g * heads, n, m)
    weights = torch.softmax(scores, dim=-1)
    out = torch.bmm(weights, v.reshape(g * heads, m, d)).reshape(g, heads, n, d)
    return out.permute(0, 2, 1, 3).reshape(g, n, heads * d)


def _make(leaf: Leaf) -> LegalLeaf | None:
    return LegalLeaf(leaf.changed(kernel=attend_in_batches)) if isinstance(leaf, AttentionLeaf) else None


ATTENTION_IN_BATCHES = LegalForm("attention-in-batches", AttentionLeaf.trait, _make)
