"""Convolutions of the video autoencoder as leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.contracts import CausalConv3dLeaf, channels_to_frames
from toolchain.ir.leaves import Leaf


class Conv2d(nn.Conv2d, Leaf):
    """A convolution over ``[n, C, H, W]``."""

    kind = "conv2d"


class Upsample(Leaf):
    """Twice the height and width by repetition, then a convolution."""

    kind = "upsample"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[n, C, H, W]`` to ``[n, C, 2H, 2W]``."""
        out: torch.Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Downsample(Leaf):
    """Half the height and width by a strided convolution, padded right and below only."""

    kind = "downsample"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[n, C, H, W]`` to ``[n, C, H//2, W//2]``."""
        out: torch.Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class CausalConv3d(CausalConv3dLeaf):
    """A cubic convolution that looks at past frames only: the zeros before the first frame are its padding.

    Args:
        kernel: size in time, height and width.
        time_stride: frames in a frame out.
        time_up: frames out a frame in: that many channels of the convolution become frames.
    """

    def __init__(
        self, cin: int, cout: int, kernel: int, *, bias: bool = True, time_stride: int = 1, time_up: int = 1
    ) -> None:
        super().__init__()
        self.kernel, self.time_stride, self.time_up = kernel, time_stride, time_up
        side = kernel // 2
        self.conv = nn.Conv3d(
            cin, cout * time_up, kernel, stride=(time_stride, 1, 1), padding=(0, side, side), bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, C_in, T, H, W]`` to ``[B, C_out, T·up/stride, H, W]``."""
        if self.time_pad:
            x = F.pad(x, (0, 0, 0, 0, self.time_pad, 0))
        return channels_to_frames(self.conv(x), self.time_up)
