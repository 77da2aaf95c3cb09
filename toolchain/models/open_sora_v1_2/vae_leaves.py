"""The leaves of the video autoencoder other than convolutions: norm, attention, scaling of latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.contracts import AttentionLeaf
from toolchain.ir.leaves import Leaf


def group_norm(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """``norm`` over ``x`` ``[B, C, …]``, jointly over all places.

    Places are one dimension meanwhile: a norm over a video would split its channels into a sixth.
    """
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    return F.group_norm(flat, norm.num_groups, norm.weight, norm.bias, norm.eps).reshape(x.shape)


class GroupNorm(nn.GroupNorm, Leaf):
    """Group norm over ``[B, C, H, W]`` or ``[B, C, T, H, W]``."""

    kind = "group_norm"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self)


class PixelAttention(AttentionLeaf):
    """Each frame's latent pixels attend to one another, with one head; normed before, added after."""

    kind = "pixel_attention"

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[n, C, H, W]``; same shape out."""
        n, c, height, width = x.shape
        tokens = group_norm(x, self.group_norm).reshape(n, c, height * width).transpose(1, 2)
        q, k, v = (to(tokens).reshape(n, height * width, 1, c) for to in (self.to_q, self.to_k, self.to_v))
        out: torch.Tensor = self.to_out[0](self.kernel(q, k, v, None))
        return x + out.transpose(1, 2).reshape(n, c, height, width)


class Denormalize(Leaf):
    """Latents as the transformer knows them to latents as the temporal autoencoder knows them."""

    kind = "latent_scale"

    def forward(self, z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """``z`` ``[B, C, T, H, W]``; ``scale`` and ``shift`` ``[1, C, 1, 1, 1]``."""
        return z * scale + shift


class Unscale(Leaf):
    """Undoes the scaling of spatial latents."""

    kind = "latent_scale"

    def forward(self, x_z: torch.Tensor, scaling: float) -> torch.Tensor:
        """``x_z`` ``[n, C, H, W]``; same shape out."""
        return x_z / scaling


class PadFrames(Leaf):
    """Puts frames of zeros in front."""

    kind = "pad"

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """``x`` ``[B, C, T, H, W]`` to ``[B, C, frames + T, H, W]``."""
        return F.pad(x, (0, 0, 0, 0, frames, 0))


def split_moments(moments: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance, ``channels`` each; the latter within bounds that keep its exponential finite."""
    return moments[:, :channels], torch.clamp(moments[:, channels:], -30.0, 20.0)
