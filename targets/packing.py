"""Numbers of few bits as files of weights hold them: one after the other, from the least significant bit upwards."""

from __future__ import annotations

import numpy as np
import torch

PIECE = 1 << 17
"""Numbers that are packed in one go: what a processor's cache holds."""
FOLDS = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))
"""Widths of lanes of a 64-bit word, and the mask of every other one."""


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of ``bits`` bits, one a byte, packed: flat uint8. What is left of the last byte is zeros.

    Eight numbers fill as many bytes as one of them has bits. So they are folded as one word: neighbours are moved
    together three times, which takes a few steps for eight numbers whatever the width.
    """
    numbers = values.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    if bits == 8:
        return torch.from_numpy(numbers)
    packed = np.empty(-(-len(numbers) // 8) * bits, np.uint8)
    for at in range(0, len(numbers), PIECE):
        taken = numbers[at : at + PIECE]
        if len(taken) % 8:
            taken = np.concatenate([taken, np.zeros(-len(taken) % 8, np.uint8)])
        words = taken.view(np.uint64) & np.uint64((2**bits - 1) * 0x0101010101010101)
        for width, mask in FOLDS:
            apart = np.uint64(width - bits * (width // 8))
            words = (words & np.uint64(mask)) | ((words & ~np.uint64(mask)) >> apart)
        folded = words.view(np.uint8).reshape(-1, 8)[:, :bits]
        packed[at // 8 * bits :][: folded.size] = folded.reshape(-1)
    return torch.from_numpy(packed[: -(-len(numbers) * bits // 8)])
