"""What a leaf may offer to be changed: contracts between the models, which keep them, and the targets' legal forms.

A model's leaf inherits from the contracts that it keeps. A target's form relies on nothing else, so it serves
every model whose leaves keep the contract. Defaults are the plain forms; a form must compute the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.leaves import Leaf

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Scaled dot-product attention, called with query, key, value and bias; see :func:`attend`."""

Activation = Callable[[torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Scaled dot-product attention as one operator.

    Args:
        q: ``[G, N, h, d]`` (groups that attend separately, tokens, heads, head size).
        k, v: ``[G, M, h, d]``.
        bias: added to the scores, ``[G, 1, 1, M]`` or broadcastable, or None.

    Returns:
        ``[G, N, h·d]``.
    """
    g, n, heads, d = q.shape
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.permute(0, 2, 1, 3).reshape(g, n, heads * d)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU as one operator."""
    return F.gelu(x, approximate="tanh")


class AttentionLeaf(Leaf):
    """A leaf that attends, by calling ``kernel`` on queries, keys, values and bias."""

    trait = "attention"
    kernel: Attend = staticmethod(attend)


class GeluLeaf(Leaf):
    """A leaf with a tanh-GELU in it, which it computes by calling ``gelu``."""

    trait = "gelu"
    gelu: Activation = staticmethod(tanh_gelu)


class ResidualLeaf(Leaf):
    """A leaf that writes to or reads from a residual stream which can stand scaled.

    The stream that it stands in is the true one times ``scale``. A leaf that writes multiplies what it adds;
    one that only reads must compute the same whatever the scale, and overrides ``output_scale``. The scale
    is for all leaves of a graph or for none.
    """

    trait = "residual_stream"
    scale: float = 1.0

    @property
    def output_scale(self) -> float:
        return self.scale

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.scale == 1.0 else x * self.scale


class EmbeddingLeaf(Leaf):
    """Looks rows of the table ``weight`` ``[entries, C]`` up."""

    trait = "embedding_table"
    weight: nn.Parameter


class PatchEmbedLeaf(Leaf):
    """A leaf that cuts frames into patches and projects each: ``[B, C_in, T, H, W]`` to tokens ``[B, T·S, C]``.

    ``proj`` covers one patch and its stride is the patch. The leaf must reckon with a linear layer over the
    patch's pixels in its place, in the order of the convolution's flattened weight.
    """

    kind = "patch_embed"
    delicate = True
    proj: nn.Conv3d | nn.Linear


class CausalConv3dLeaf(Leaf):
    """A cubic convolution over ``[B, C_in, T, H, W]`` that looks at past frames only, to ``[B, C_out, T', H, W]``.

    Zeros before the first frame are its padding in time. ``conv`` pads height and width by half its size and
    not time, and has the stride ``(time_stride, 1, 1)``; its result goes through :func:`channels_to_frames`.
    """

    kind = "conv3d"
    conv: nn.Conv3d
    kernel: int
    """Size in time, height and width."""
    time_stride: int
    """Frames in a frame out."""
    time_up: int
    """Frames out a frame in: that many channels of the convolution become frames."""

    @property
    def time_pad(self) -> int:
        """Frames of zeros in front."""
        return self.kernel - self.time_stride


def channels_to_frames(x: torch.Tensor, up: int) -> torch.Tensor:
    """``[B, C·up, T, H, W]`` to ``[B, C, T·up, H, W]``: channel ``c·up + i`` is frame ``i`` of ``up``.

    Batch and channels stand as one dimension meanwhile, so that no tensor has more than five.
    """
    if up == 1:
        return x
    b, channels, t, h, w = x.shape
    c = channels // up
    return x.reshape(b * c, up, t, h * w).transpose(1, 2).reshape(b, c, t * up, h, w)
