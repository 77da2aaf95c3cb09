"""The leaves of STDiT3 other than attention: embeddings, tables, MLP, first and last layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.contracts import GeluLeaf, PatchEmbedLeaf
from toolchain.ir.graph import leaf_function
from toolchain.ir.leaves import Leaf
from toolchain.models.open_sora_v1_2.attention import MASKED
from toolchain.models.open_sora_v1_2.modulation import modulate, per_token


class PositionTable(Leaf):
    """Sine-cosine embedding of a patch's place in its frame; a table without weights."""

    kind = "table"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, hp: int, wp: int, scale: float) -> torch.Tensor:
        """``[1, hp·wp, C]``, row-major; channels are sin and cos of the column, then of the row."""
        base = round(math.sqrt(hp * wp))
        inv_freq = 10000 ** (-torch.arange(0, self.dim // 2, 2).float() / (self.dim // 2))

        def embed(size: int) -> torch.Tensor:
            places = torch.arange(size).float() / scale * (base / size)
            angles = places[:, None] * inv_freq
            return torch.cat((angles.sin(), angles.cos()), dim=-1)

        columns = embed(wp)[None].expand(hp, wp, self.dim // 2)
        rows = embed(hp)[:, None].expand(hp, wp, self.dim // 2)
        return torch.cat((columns, rows), dim=-1).reshape(1, hp * wp, self.dim)


class RotaryTable(Leaf):
    """Cosines and sines of the temporal rotary embedding. Its frequencies are a tensor of the checkpoint."""

    kind = "table"

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        freqs = 10000 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, frames: int) -> torch.Tensor:
        """``[2, T, d/2]``: cos, then sin, of position × frequency."""
        positions = torch.arange(frames, dtype=self.freqs.dtype, device=self.freqs.device)
        angles = positions[:, None] * self.freqs
        return torch.stack((angles.cos(), angles.sin()))


class TextBias(Leaf):
    """Mask of the prompt's tokens as an additive attention bias."""

    kind = "mask"

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """``mask`` ``[B, L]``, 1 real and 0 padding, to ``[B, 1, 1, L]``, 0 and MASKED."""
        return ((1.0 - mask) * MASKED).reshape(mask.shape[0], 1, 1, mask.shape[1])


class PatchEmbed(PatchEmbedLeaf):
    """Cuts frames into patches and projects each.

    The kernel covers one patch and the stride is the patch, so the official convolution is a matrix
    product over the patch's pixels.
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch[1]
        self.proj = nn.Conv3d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, C_in, T, H, W]``, padded with zeros right and below, to tokens ``[B, T·S, C]``."""
        patches = frame_patches(x, self.patch)
        tokens = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # a linear layer's is flat already
        return tokens.reshape(x.shape[0], -1, tokens.shape[-1])


@leaf_function
def add_positions(x: torch.Tensor, pos_embed: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, T·S, C]`` plus ``pos_embed`` ``[1, S, C]`` in every frame."""
    b, n, c = x.shape
    if pos_embed.dtype != x.dtype:  # a model in half precision
        pos_embed = pos_embed.to(x.dtype)
    return (x.reshape(-1, pos_embed.shape[1], c) + pos_embed).reshape(b, n, c)


def frame_patches(x: torch.Tensor, patch: int) -> torch.Tensor:
    """``[B, C, T, H, W]`` to ``[B·T, S, C·p·p]``; the order within a patch is that of a conv's weight."""
    b, c, t, h, w = x.shape
    x = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
    if h % patch or w % patch:
        x = F.pad(x, (0, -w % patch, 0, -h % patch))
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


class TimestepEmbedder(Leaf):
    """Embeds a scalar (the timestep, frames per second): 256 cosines and sines, then an MLP."""

    kind = "timestep"
    delicate = True
    frequencies = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """``t`` ``[B]`` to ``[B, 1, C]``."""
        half = self.frequencies // 2
        freqs = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.reshape(-1, 1, 1).float() * freqs.reshape(1, 1, half)
        embedded = torch.cat((angles.cos(), angles.sin()), dim=-1)
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        out: torch.Tensor = self.mlp(embedded.to(first.weight.dtype))
        return out


class ModulationProjection(Leaf):
    """``Linear(SiLU(t))``: what all blocks add to their own modulation tables."""

    kind = "modulation"
    delicate = True

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.add_module("1", nn.Linear(dim, out))  # the official state_dict calls it t_block.1

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """``t`` ``[B, 1 or T, C]`` to ``[B, 1 or T, 6C]``."""
        out: torch.Tensor = self.get_submodule("1")(F.silu(t))
        return out


class Mlp(GeluLeaf):
    """Linear, tanh-GELU, linear."""

    kind = "mlp"

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.gelu(self.fc1(x)))
        return out


class FinalLayer(Leaf):
    """Norm, modulation by the timestep itself (not its projection), and the projection to pixels."""

    kind = "final"
    delicate = True

    def __init__(self, dim: int, patch: tuple[int, int, int], out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, math.prod(patch) * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        t0: torch.Tensor | None = None,
        x_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` ``[B, T·S, C]``, ``t`` and ``t0`` ``[B, 1, C]``, ``x_mask`` ``[B, T]``, to ``[B, T·S, p·p·C_out]``.

        Frames given as condition are normalised and modulated twice, with ``t`` and then with ``t0``: the
        official code does so, and checkpoints are trained with it.
        """
        h = self._modulated(x, t)
        if t0 is not None and x_mask is not None:
            m = per_token(x_mask.reshape(x.shape[0], -1, 1), x)
            h = h * m + self._modulated(h, t0) * (1 - m)
        out: torch.Tensor = self.linear(h)
        return out

    def _modulated(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        table = self.scale_shift_table
        return modulate(self.norm_final(x), t + table[0:1], t + table[1:2])


class Unpatchify(Leaf):
    """Puts the patches' pixels back in place and crops the padding."""

    kind = "unpatchify"

    def __init__(self, patch: tuple[int, int, int], out_channels: int) -> None:
        super().__init__()
        self.patch = patch[1]
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor, dims: tuple[int, int, int, int, int]) -> torch.Tensor:
        """``x`` ``[B, T·S, p·p·C_out]``, ``dims`` (T, Hp, Wp, H, W), to ``[B, C_out, T, H, W]``."""
        frames, hp, wp, height, width = dims
        b, c, p = x.shape[0], self.out_channels, self.patch
        # channels come last in a patch; pixel_shuffle wants them first
        x = x.reshape(b * frames * hp * wp, p * p, c).transpose(1, 2).reshape(b * frames, hp * wp, c * p * p)
        x = x.transpose(1, 2).reshape(b * frames, c * p * p, hp, wp)
        x = F.pixel_shuffle(x, p)[:, :, :height, :width]
        return x.reshape(b, frames, c, height, width).permute(0, 2, 1, 3, 4)
