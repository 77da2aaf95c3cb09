"""Conv3d as a sum of Conv2d, for runtimes that have no other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.ir.contracts import CausalConv3dLeaf, channels_to_frames
from toolchain.ir.leaves import Leaf, LegalForm, LegalLeaf
from toolchain.ir.weights import WeightSource


class CausalConvTaps(Leaf):
    """A :class:`~toolchain.ir.contracts.CausalConv3dLeaf` as a sum of one Conv2d a time tap.

    Each tap has a weight of its own; parameters are on the ``meta`` device.
    """

    kind = CausalConv3dLeaf.kind

    def __init__(self, plain: CausalConv3dLeaf) -> None:
        super().__init__()
        self.time_pad, self.time_stride, self.time_up = plain.time_pad, plain.time_stride, plain.time_up
        cout, cin = plain.conv.weight.shape[:2]
        bias = plain.conv.bias is not None
        self.taps = nn.ModuleList(
            nn.Conv2d(cin, cout, plain.kernel, padding=plain.kernel // 2, bias=bias and i == 0, device="meta")
            for i in range(plain.kernel)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the plain leaf's; frames stand in the batch dimension meanwhile."""
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


def _make(leaf: Leaf) -> LegalLeaf | None:
    if isinstance(leaf, CausalConvTaps):
        return LegalLeaf(leaf)
    if not isinstance(leaf, CausalConv3dLeaf):
        return None
    cout, cin = leaf.conv.weight.shape[:2]
    shape = (cout, cin, leaf.kernel, leaf.kernel)
    sources = {f"taps.{i}.weight": WeightSource(("conv.weight",), shape, select=((2, i),)) for i in range(leaf.kernel)}
    if leaf.conv.bias is not None:
        sources["taps.0.bias"] = WeightSource(("conv.bias",), (cout,))
    return LegalLeaf(CausalConvTaps(leaf), sources)


CONV3D_BY_TAPS = LegalForm("conv3d-by-taps", CausalConv3dLeaf.kind, _make)
