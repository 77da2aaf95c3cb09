"""The spatial half of the video autoencoder: a diffusers AutoencoderKL, frame by frame.

Blocks are traced through, so a partition may cut between any two residual blocks; what flows between
them is ``x`` ``[n, C, H, W]``, n frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.graph import wire
from toolchain.models.open_sora_v1_2.vae_config import SpatialVAEConfig
from toolchain.models.open_sora_v1_2.vae_conv import Conv2d, Downsample, Upsample
from toolchain.models.open_sora_v1_2.vae_leaves import (
    GroupNorm,
    PixelAttention,
    Unscale,
    split_moments,
)

EPS = 1e-6
"""Of every norm here; the temporal autoencoder has another."""


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the input is added, projected when channels change."""

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, cin, eps=EPS)
        self.conv1 = Conv2d(cin, cout, 3, padding=1)
        self.norm2 = GroupNorm(groups, cout, eps=EPS)
        self.conv2 = Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h  # type: ignore[no-any-return]


class DownBlock(nn.Module):
    """Residual blocks, then half the size unless it is the last level."""

    def __init__(self, cin: int, cout: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(cout)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = wire(layer(x), "x")
        return x


class UpBlock(nn.Module):
    """Residual blocks, then twice the size unless it is the last level."""

    def __init__(self, cin: int, cout: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout, groups) for i in range(layers))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(cout)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = wire(layer(x), "x")
        return x


class MidBlock(nn.Module):
    """Residual block, attention among pixels, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups, EPS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = wire(layer(x), "x")
        return x


class Encoder(nn.Module):
    """Pixels to the moments of a latent, before ``quant_conv``."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        inputs = (channels[0], *channels)
        self.down_blocks = nn.ModuleList(
            DownBlock(cin, cout, config.layers_per_block, groups, last=i == len(channels) - 1)
            for i, (cin, cout) in enumerate(zip(inputs[:-1], channels, strict=True))
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[n, 3, H, W]`` to ``[n, 2·C_latent, H/8, W/8]``."""
        x = wire(self.conv_in(x), "x")
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: torch.Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Decoder(nn.Module):
    """A latent, after ``post_quant_conv``, to pixels."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        inputs = (channels[0], *channels)
        self.up_blocks = nn.ModuleList(
            UpBlock(cin, cout, config.layers_per_block + 1, groups, last=i == len(channels) - 1)
            for i, (cin, cout) in enumerate(zip(inputs[:-1], channels, strict=True))
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """``z`` ``[n, C_latent, h, w]`` to ``[n, 3, 8h, 8w]``."""
        x = self.mid_block(wire(self.conv_in(z), "x"))
        for block in self.up_blocks:
            x = block(x)
        out: torch.Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class AutoencoderKL(nn.Module):
    """The image autoencoder, with the state_dict of diffusers' class of this name."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels ``[n, 3, H, W]`` to mean and log variance of the latent, each ``[n, C, h, w]``."""
        return split_moments(self.quant_conv(self.encoder(x)), self.config.latent_channels)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """A latent ``[n, C, h, w]`` to pixels ``[n, 3, H, W]``, about -1 … 1."""
        out: torch.Tensor = self.decoder(self.post_quant_conv(z))
        return out


class SpatialVAE(nn.Module):
    """The image autoencoder with Open-Sora's scaling: its latent times ``scaling`` is ``x_z``."""

    def __init__(self, config: SpatialVAEConfig, scaling: float) -> None:
        super().__init__()
        self.module = AutoencoderKL(config)
        self.unscale = Unscale()
        self.scaling = scaling

    def decode(self, x_z: torch.Tensor) -> torch.Tensor:
        """``x_z`` ``[n, C, h, w]`` to pixels ``[n, 3, H, W]``."""
        return self.module.decode(self.unscale(x_z, scaling=self.scaling))
