"""The temporal half of the video autoencoder: spatial latents of a chunk of frames to fewer, and back.

Blocks are traced through, so a partition may cut between any two residual blocks; what flows between
them is ``x`` ``[B, C, T, H, W]``. All convolutions look back in time only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.graph import wire
from toolchain.models.open_sora_v1_2.vae_config import TemporalVAEConfig
from toolchain.models.open_sora_v1_2.vae_conv import CausalConv3d
from toolchain.models.open_sora_v1_2.vae_leaves import GroupNorm, PadFrames, split_moments


class ResBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice; the input is added, projected when channels change."""

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, cin)
        self.conv1 = CausalConv3d(cin, cout, 3, bias=False)
        self.norm2 = GroupNorm(groups, cout)
        self.conv2 = CausalConv3d(cout, cout, 3, bias=False)
        self.conv3 = CausalConv3d(cin, cout, 1, bias=False) if cin != cout else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.conv3 is None else self.conv3(x)
        return shortcut + h  # type: ignore[no-any-return]


def res_blocks(cin: int, cout: int, config: TemporalVAEConfig) -> nn.ModuleList:
    """One level's residual blocks; the first changes the channels."""
    blocks = (ResBlock(cin if i == 0 else cout, cout, config.num_groups) for i in range(config.num_res_blocks))
    return nn.ModuleList(blocks)


class Encoder(nn.Module):
    """Spatial latents to moments, before ``quant_conv``; each down-sampling level halves the frames."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = CausalConv3d(config.in_out_channels, channels[0], 3, bias=False)
        inputs = (channels[0], *channels)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(cin, cout, config) for cin, cout in zip(inputs[:-1], channels, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(c, c, 3, time_stride=2) if down else nn.Identity()
            for c, down in zip(channels[:-1], config.temporal_downsample, strict=True)
        )
        self.res_blocks = res_blocks(channels[-1], channels[-1], config)
        self.norm1 = GroupNorm(config.num_groups, channels[-1])
        self.conv2 = CausalConv3d(channels[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, C_in, T, h, w]`` to ``[B, 2·C_latent, T/4, h, w]``."""
        x = wire(self.conv_in(x), "x")
        for i, blocks in enumerate(self.block_res_blocks):
            x = run(blocks, x)
            if i < len(self.conv_blocks):
                x = run(self.conv_blocks[i : i + 1], x)
        x = run(self.res_blocks, x)
        out: torch.Tensor = self.conv2(F.silu(self.norm1(x)))
        return out


class Decoder(nn.Module):
    """Latents, after ``post_quant_conv``, to spatial latents; each up-sampling level doubles the frames."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv1 = CausalConv3d(config.latent_embed_dim, channels[-1], 3)
        self.res_blocks = res_blocks(channels[-1], channels[-1], config)
        inputs = (*channels[1:], channels[-1])
        self.block_res_blocks = nn.ModuleList(
            res_blocks(cin, cout, config) for cin, cout in zip(inputs, channels, strict=True)
        )
        # conv_blocks[i] stands between the levels i + 1 and i, at the channels of the deeper
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(deeper, deeper, 3, time_up=2) if down else nn.Identity()
            for deeper, down in zip(channels[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = GroupNorm(config.num_groups, channels[0])
        self.conv_out = CausalConv3d(channels[0], config.in_out_channels, 3)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """``z`` ``[B, C_latent, t, h, w]`` to ``[B, C_out, 4t, h, w]``."""
        x = run(self.res_blocks, wire(self.conv1(z), "x"))
        for i in reversed(range(len(self.block_res_blocks))):
            x = run(self.block_res_blocks[i], x)
            if i > 0:
                x = run(self.conv_blocks[i - 1 : i], x)
        out: torch.Tensor = self.conv_out(F.silu(self.norm1(x)))
        return out


def run(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``x`` through a list of layers, named ``x`` after each; the official identities are passed over."""
    for layer in layers.children():
        if not isinstance(layer, nn.Identity):
            x = wire(layer(x), "x")
    return x


class TemporalVAE(nn.Module):
    """The temporal autoencoder of one chunk of frames.

    The encoder sees a whole number of latent frames: zeros stand in front of a chunk that has no such
    number of frames, and the decoder's first frames are dropped accordingly.
    """

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.pad_frames = PadFrames()
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = Decoder(config)

    def padding(self, frames: int) -> int:
        """Frames in front of ``frames`` that make a whole number of latent frames."""
        return -frames % self.config.factor

    def moments(self, x_z: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``x_z`` ``[B, C, frames, h, w]`` to mean and log variance, each ``[B, C, t, h, w]``."""
        if self.padding(frames):
            x_z = self.pad_frames(x_z, frames=self.padding(frames))
        return split_moments(self.quant_conv(self.encoder(x_z)), self.config.embed_dim)

    def decode(self, z: torch.Tensor, frames: int) -> torch.Tensor:
        """``z`` ``[B, C, t, h, w]`` to ``x_z`` ``[B, C, frames, h, w]``; t is frames / 4, rounded up."""
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, self.padding(frames) :] if self.padding(frames) else x  # type: ignore[no-any-return]
