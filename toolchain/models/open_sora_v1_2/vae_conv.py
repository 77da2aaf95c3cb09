"""Convolutions of the video autoencoder as leaves, and the form of Conv3d for runtimes that have none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.graph import Leaf, LegalLeaf
from toolchain.ir.weights import WeightSource


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


class CausalConv3d(Leaf):
    """A cubic convolution that looks at past frames only: the zeros before the first frame are its padding.

    Args:
        kernel: size in time, height and width.
        time_stride: frames in a frame out.
        time_up: frames out a frame in: that many channels of the convolution become frames.
    """

    kind = "conv3d"

    def __init__(
        self, cin: int, cout: int, kernel: int, *, bias: bool = True, time_stride: int = 1, time_up: int = 1
    ) -> None:
        super().__init__()
        self.kernel, self.time_stride, self.time_up = kernel, time_stride, time_up
        side = kernel // 2
        self.conv = nn.Conv3d(
            cin, cout * time_up, kernel, stride=(time_stride, 1, 1), padding=(0, side, side), bias=bias
        )

    @property
    def time_pad(self) -> int:
        """Frames of zeros in front."""
        return self.kernel - self.time_stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, C_in, T, H, W]`` to ``[B, C_out, T·up/stride, H, W]``."""
        if self.time_pad:
            x = F.pad(x, (0, 0, 0, 0, self.time_pad, 0))
        return channels_to_frames(self.conv(x), self.time_up)

    def legal(self, rule: str) -> LegalLeaf | None:
        if rule != "conv3d-taps":
            return None
        taps = CausalConvTaps(self)
        cout, cin = self.conv.weight.shape[:2]
        shape = (cout, cin, self.kernel, self.kernel)
        sources = {
            f"taps.{i}.weight": WeightSource(("conv.weight",), shape, select=((2, i),)) for i in range(self.kernel)
        }
        if self.conv.bias is not None:
            sources["taps.0.bias"] = WeightSource(("conv.bias",), (cout,))
        return LegalLeaf(taps, sources)


class CausalConvTaps(Leaf):
    """``CausalConv3d`` as a sum of one Conv2d a time tap, each with a weight of its own.

    Parameters are on the ``meta`` device; ``CausalConv3d.legal`` says where they come from.
    """

    kind = "conv3d"

    def __init__(self, conv: CausalConv3d) -> None:
        super().__init__()
        self.time_pad, self.time_stride, self.time_up = conv.time_pad, conv.time_stride, conv.time_up
        cout, cin = conv.conv.weight.shape[:2]
        bias = conv.conv.bias is not None
        self.taps = nn.ModuleList(
            nn.Conv2d(cin, cout, conv.kernel, padding=conv.kernel // 2, bias=bias and i == 0, device="meta")
            for i in range(conv.kernel)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``CausalConv3d``; frames stand in the batch dimension meanwhile."""
        b, c, t, h, w = x.shape
        if len(self.taps) == 1:  # no frame sees another, so no dimension has to move
            out = self.taps[0](x.reshape(b, c, t * h, w)).reshape(b, -1, t, h, w)
            return channels_to_frames(out, self.time_up)
        frames = F.pad(x.permute(0, 2, 1, 3, 4).reshape(b, t, c * h * w), (0, 0, self.time_pad, 0))
        out_frames = (t + self.time_pad - len(self.taps)) // self.time_stride + 1
        span = (out_frames - 1) * self.time_stride + 1
        seen = (frames[:, i : i + span : self.time_stride].reshape(-1, c, h, w) for i in range(len(self.taps)))
        parts = [tap(s) for tap, s in zip(self.taps, seen, strict=True)]
        out = sum(parts[1:], start=parts[0]).reshape(b, out_frames, -1, h, w).permute(0, 2, 1, 3, 4)
        return channels_to_frames(out, self.time_up)


def channels_to_frames(x: torch.Tensor, up: int) -> torch.Tensor:
    """``[B, C·up, T, H, W]`` to ``[B, C, T·up, H, W]``: channel ``c·up + i`` is frame ``i`` of ``up``.

    Batch and channels stand as one dimension meanwhile, so that no tensor has more than five.
    """
    if up == 1:
        return x
    b, channels, t, h, w = x.shape
    c = channels // up
    return x.reshape(b * c, up, t, h * w).transpose(1, 2).reshape(b, c, t * up, h, w)
