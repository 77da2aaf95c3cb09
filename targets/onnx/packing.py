"""Parts of weights as bytes: signed numbers made unsigned, and nibbles two in a byte, the first in the low half."""

from __future__ import annotations

import torch

from targets.onnx.storages import Form
from targets.packing import pack


def packed(part: torch.Tensor, form: Form) -> torch.Tensor:
    """What is written for a part; a part that is stored as it is comes back as it is."""
    if form == "uint8":
        return part.contiguous().view(torch.uint8) ^ 0x80
    if form == "int4":
        return pack(part, 4)
    if form == "uint4":
        rows = part.reshape(len(part), -1)
        if rows.shape[1] % 2:  # an odd row ends with a zero
            rows = torch.nn.functional.pad(rows, (0, 1))
        return pack(rows, 4).bitwise_xor_(0x88).reshape(len(rows), -1)
    return part
