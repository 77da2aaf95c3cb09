"""The leaves of the sample component: one for each contract that targets have legal forms for, and a few plain ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.contracts import (
    AttentionLeaf,
    CausalConv3dLeaf,
    GeluLeaf,
    PatchEmbedLeaf,
    ResidualLeaf,
    channels_to_frames,
)
from toolchain.ir.leaves import Leaf


class SampleConv3d(CausalConv3dLeaf):
    """``[B, c, T, H, W]`` to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel, self.time_stride, self.time_up = 3, 1, 1
        self.conv = nn.Conv3d(channels, channels, 3, padding=(0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return channels_to_frames(self.conv(F.pad(x, (0, 0, 0, 0, self.time_pad, 0))), self.time_up)


class SamplePatchEmbed(PatchEmbedLeaf):
    """``[B, c, T, H, W]`` to tokens ``[B, T·S, C]``, S = (H/p)·(W/p)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, width, (1, patch, patch), stride=(1, patch, patch))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        frames = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
        patches = F.pixel_unshuffle(frames, self.patch).flatten(2).transpose(1, 2)
        tokens = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return tokens.reshape(b, -1, tokens.shape[-1])


class SamplePositions(Leaf):
    """A table that is known when the bundle is built: ``[1, N, C]``."""

    kind = "table"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: int) -> torch.Tensor:
        places = torch.arange(tokens, dtype=torch.float32, device=self.frequencies.device)
        return torch.sin(places.reshape(1, tokens, 1) * self.frequencies)


class SampleStart(ResidualLeaf):
    """The first to write to the residual stream: tokens plus positions, both ``[B, N, C]``."""

    kind = "start"

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.scaled(x + positions)


class SampleLevel(Leaf):
    """The timestep ``[B]`` as a vector ``[B, 1, C]``."""

    kind = "timestep"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, width)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(t.reshape(-1, 1, 1) * 0.001)
        return out


class SampleNorm(ResidualLeaf):
    """The stream ``[B, N, C]`` normalised, whatever it is scaled by."""

    kind = "norm"

    @property
    def output_scale(self) -> float:
        return 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.scale == 1.0 else x * (1.0 / self.scale)
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)


class SampleSelfAttention(ResidualLeaf, AttentionLeaf):
    """Tokens ``[B, T·S, C]`` attend to those of their frame."""

    kind = "self_attention"

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        b, n, c = x.shape
        groups = self.qkv(x).reshape(b * frames, n // frames, 3 * c)
        shape = (b * frames, n // frames, self.heads, c // self.heads)
        q, k, v = (groups[:, :, i * c : (i + 1) * c].reshape(shape) for i in range(3))
        out: torch.Tensor = self.proj(self.kernel(q, k, v, None).reshape(b, n, c))
        return self.scaled(out)


class SampleCrossAttention(ResidualLeaf, AttentionLeaf):
    """Tokens ``[B, N, C]`` attend to the text ``[B, L, C]``; ``mask`` ``[B, L]`` is 1 for what may be seen."""

    kind = "cross_attention"

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        size = text.shape[1]
        both, head = self.kv(text), c // self.heads
        k, v = (both[:, :, i * c : (i + 1) * c].reshape(b, size, self.heads, head) for i in range(2))
        bias = ((1.0 - mask) * -30.0).reshape(b, 1, 1, size)
        out: torch.Tensor = self.proj(self.kernel(self.q(x).reshape(b, n, self.heads, head), k, v, bias))
        return self.scaled(out)


class SampleMlp(ResidualLeaf, GeluLeaf):
    """Linear, tanh-GELU, linear on ``[B, N, C]``."""

    kind = "mlp"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.gelu(self.fc1(x)))
        return self.scaled(out)


class SampleEnd(Leaf):
    """Tokens ``[B, N, C]`` to pixels ``[B, N, c]``."""

    kind = "final"

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, pixels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out
