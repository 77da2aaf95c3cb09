"""A legal form: attention as two matrix products and a softmax, so that programs have no fused operator."""

from __future__ import annotations

import torch

from toolchain.ir.contracts import AttentionLeaf
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf


def attend_in_steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As :func:`toolchain.ir.contracts.attend`: ``[G, N, h, d]`` and twice ``[G, M, h, d]`` to ``[G, N, h·d]``."""
    g, n, heads, d = q.shape
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = torch.matmul(q * d**-0.5, k.transpose(2, 3))
    if bias is not None:
        scores = scores + bias
    return torch.matmul(torch.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).reshape(g, n, heads * d)


def _make(leaf: Leaf) -> LegalLeaf | None:
    return LegalLeaf(leaf.changed(kernel=attend_in_steps)) if isinstance(leaf, AttentionLeaf) else None


ATTENTION_IN_STEPS = LegalForm("attention-in-steps", AttentionLeaf.trait, _make)
