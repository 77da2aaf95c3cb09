"""The leaves of the T5 encoder: token table, relative positions, mask, attention, norm and gated MLP.

The residual stream of a trained T5 leaves float16's range in its deeper blocks. But it is a sum of what the
token table, the attentions and the MLPs add to it, and is read through norms alone, which do not see a
common factor. So every writer can add its value times a ``scale``, and the encoder's output stays what it
was; see :class:`~toolchain.ir.contracts.ResidualLeaf`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.contracts import AttentionLeaf, EmbeddingLeaf, GeluLeaf, ResidualLeaf
from toolchain.ir.leaves import Leaf
from toolchain.models.open_sora_v1_2.attention import MASKED, RMSNorm

SMALLEST_PEAK = 2.0**-14
"""The smallest normal float16 number; keeps the reciprocal of a row's peak finite."""


class TokenEmbedding(ResidualLeaf, EmbeddingLeaf):
    """The table of tokens."""

    kind = "embedding"

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, dim))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids`` ``[B, L]`` int32 or int64, to ``[B, L, C]``."""
        return self.scaled(F.embedding(ids, self.weight))


class PositionBias(Leaf):
    """What a head adds to the score of two tokens for their distance; one table for all blocks.

    Distances share buckets: each direction has half of them, of which the nearer half holds one distance
    each and the rest grow with the logarithm of the distance, up to ``max_distance`` and all beyond.
    """

    kind = "table"

    def __init__(self, buckets: int, max_distance: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(buckets, heads))
        self.max_distance = max_distance

    def forward(self, length: int) -> torch.Tensor:
        """``[1, h, L, L]`` with L = ``length``: bias of head h for query (row) and key (column)."""
        places = torch.arange(length, device=self.weight.device)
        bias = F.embedding(self.buckets(places[None, :] - places[:, None]), self.weight)
        return bias.permute(2, 0, 1).reshape(1, -1, length, length)

    def buckets(self, offset: torch.Tensor) -> torch.Tensor:
        """Bucket of each ``offset`` (key's place minus query's), in the reference's own float32 arithmetic."""
        half = self.weight.shape[0] // 2  # of the buckets: keys after the query have the upper half
        near = half // 2
        distance = offset.abs()
        octaves = torch.log(distance.clamp(min=1).float() / near) / math.log(self.max_distance / near)
        far = (near + (octaves * (half - near)).long()).clamp(max=half - 1)
        return torch.where(distance < near, distance, far) + (offset > 0).long() * half


class AttentionBias(Leaf):
    """Position bias and padding mask in one: all that is added to the scores, equal in every block."""

    kind = "mask"

    def forward(self, position_bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``position_bias`` ``[1, h, L, L]``, ``mask`` ``[B, L]`` (1 real, 0 padding), to ``[B, h, L, L]``."""
        return position_bias + ((1.0 - mask) * MASKED).reshape(mask.shape[0], 1, 1, mask.shape[1])


class BiasedAttention(ResidualLeaf, AttentionLeaf):
    """Attention with a bias and without the scale 1/√d; no parameters of its own.

    The projections stay outside: the checkpoint keeps the position table with those of block 0, and a leaf
    that held them would hold the table too, and differ from the other blocks' leaves.
    """

    kind = "attention"

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``q``, ``k``, ``v`` ``[B, L, h·d]``, ``bias`` ``[B, h, L, L]``, to ``[B, L, h·d]``."""
        b, n, inner = q.shape
        d = inner // self.heads
        q, k, v = (x.reshape(b, n, self.heads, d) for x in (q * d**0.5, k, v))  # takes back what the kernel divides by
        return self.scaled(self.kernel(q, k, v, bias))


class Norm(RMSNorm, ResidualLeaf):
    """RMS norm over the hidden size; no mean, no bias. Does not see the scale of what it reads."""

    kind = "norm"

    @property
    def output_scale(self) -> float:
        return 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, L, C]`` to ``[B, L, C]``."""
        if self.scale == 1.0:
            return super().forward(x)
        # float16 cannot hold squares of values above 255: put the row's peak at 1 before squaring, and
        # give eps the same factor
        factor = 1.0 / x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_PEAK)
        eps = (factor * (self.scale * self.eps**0.5)) ** 2
        x = x * factor
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * self.weight


class GatedMlp(ResidualLeaf, GeluLeaf):
    """Two linears, one through tanh-GELU to gate the other, and a third back."""

    kind = "mlp"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(dim, hidden, bias=False)
        self.wi_1 = nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, L, C]`` to ``[B, L, C]``; scaled before the product, the first place where it can overflow."""
        out: torch.Tensor = self.wo(self.gelu(self.wi_0(x)) * self.scaled(self.wi_1(x)))
        return out
