"""Attention of the transformer: query/key norm, rotary embedding, and the leaves that attend."""

from __future__ import annotations

import torch
from torch import nn

from toolchain.ir.contracts import AttentionLeaf

MASKED = -30000.0
"""Additive bias of a masked key: its softmax weight is exactly zero in float32 and float16, and unlike
-inf it stays finite in every runtime."""


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x`` ``[G, N, h, d]``; ``table`` ``[2, N, d/2]`` holds cos and sin.

    The rotation is of interleaved pairs ``(x0, x1)``. The result keeps the pairs' halves apart instead of
    interleaving them again: queries and keys are permuted alike, so their products do not change.
    """
    g, n, heads, d = x.shape
    pairs = x.reshape(g * n, heads, d // 2, 2)
    x0 = pairs[:, :, :, 0:1].reshape(g, n, heads, d // 2)
    x1 = pairs[:, :, :, 1:2].reshape(g, n, heads, d // 2)
    cos, sin = (table[i : i + 1].reshape(1, n, 1, d // 2) for i in (0, 1))
    return torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1)


class RMSNorm(nn.Module):
    """``x / rms(x) · weight`` over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class SelfAttention(AttentionLeaf):
    """Attention among the tokens of one group, with fused qkv and optional query/key norm."""

    kind = "self_attention"

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def among(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Attention within each group of ``x`` ``[G, N, C]``, rotated by ``rope`` if given."""
        g, n, c = x.shape
        qkv = self.qkv(x)
        q, k, v = (qkv[:, :, i * c : (i + 1) * c].reshape(g, n, self.heads, c // self.heads) for i in range(3))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out: torch.Tensor = self.proj(self.kernel(q, k, v, None))
        return out


class SpatialAttention(SelfAttention):
    """Each frame's tokens attend to one another."""

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """``x`` ``[B, T·S, C]`` with T = ``frames``; same shape out."""
        b, n, c = x.shape
        return self.among(x.reshape(b * frames, n // frames, c), None).reshape(b, n, c)


class TemporalAttention(SelfAttention):
    """Each place's tokens attend to one another across frames, with rotary positions 0 … T-1."""

    def forward(self, x: torch.Tensor, rope: torch.Tensor, frames: int) -> torch.Tensor:
        """``x`` ``[B, T·S, C]``; ``rope`` ``[2, ≥T, d/2]``; T = ``frames``; same shape out."""
        b, n, c = x.shape
        s = n // frames
        by_place = x.reshape(b, frames, s, c).permute(0, 2, 1, 3).reshape(b * s, frames, c)
        positions = rope if rope.shape[1] == frames else rope[:, :frames]
        out = self.among(by_place, positions)
        return out.reshape(b, s, frames, c).permute(0, 2, 1, 3).reshape(b, n, c)


class CrossAttention(AttentionLeaf):
    """Every token attends to the prompt. No norm on queries and keys."""

    kind = "cross_attention"

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, text: torch.Tensor, text_bias: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, N, C]``; ``text`` ``[B, L, C]``; ``text_bias`` ``[B, 1, 1, L]``: 0, or MASKED where padded.

        The official code packs the prompts' real tokens instead; a masked token has weight zero, so the
        two are equal.
        """
        b, n, c = x.shape
        length, d = text.shape[1], c // self.heads
        q = self.q_linear(x).reshape(b, n, self.heads, d)
        kv = self.kv_linear(text)
        k, v = (kv[:, :, i * c : (i + 1) * c].reshape(b, length, self.heads, d) for i in range(2))
        out: torch.Tensor = self.proj(self.kernel(q, k, v, text_bias))
        return out
