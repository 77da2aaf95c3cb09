"""Whether numbers are finite, at the speed of memory."""

from __future__ import annotations

import torch


def finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a floating tensor is NaN or infinite.

    By the least and the largest number, which are NaN if one is: torch's isfinite takes ten times as long.
    """
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())
