"""Parts of weights as bytes: signed numbers made unsigned, and nibbles two in a byte, the first in the low half."""

from __future__ import annotations

import numpy as np
import torch

from targets.onnx.storages import Form

PIECE = 1 << 16
"""Pairs of nibbles that are packed at a time, which a processor's cache holds."""


def packed(part: torch.Tensor, form: Form) -> torch.Tensor:
    """What is written for a part; a part that is stored as it is comes back as it is."""
    if form == "uint8":
        return part.contiguous().view(torch.uint8) ^ 0x80
    if form == "int4":
        return _nibbles(part.reshape(1, -1)).reshape(-1)
    if form == "uint4":
        return _nibbles(part.reshape(len(part), -1)).bitwise_xor_(0x88)
    return part


def _nibbles(rows: torch.Tensor) -> torch.Tensor:
    """Rows of int8 with two numbers in a byte; an odd row ends with a zero."""
    if rows.shape[1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    pairs = rows.contiguous().reshape(-1).numpy().view("<u2")
    result = np.empty(len(pairs), np.uint8)
    high = np.empty(min(PIECE, len(pairs)), np.uint16)
    for begin in range(0, len(pairs), PIECE):
        taken = pairs[begin : begin + PIECE]
        above = high[: len(taken)]
        np.right_shift(taken, 4, out=above)
        above &= 0xF0
        above |= taken & 0x0F
        result[begin : begin + PIECE] = above
    return torch.from_numpy(result).reshape(len(rows), -1)
