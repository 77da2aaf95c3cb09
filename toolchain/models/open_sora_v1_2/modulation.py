"""Adaptive modulation: how a timestep shifts, scales and gates the token stream.

Values come once for all frames, ``[B, 1, C]``, or once a frame, ``[B, T, C]``, when some frames are given
as condition and stand at timestep 0.
"""

from __future__ import annotations

import torch

from toolchain.ir.graph import leaf_function


@leaf_function
def modulation(table: torch.Tensor, t_mlp: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Shift, scale, gate of attention, then of the MLP: ``table`` ``[6, C]`` + ``t_mlp`` ``[B, 1 or T, 6C]``.

    Returns six tensors ``[B, 1 or T, C]``.
    """
    c = table.shape[1]
    values = t_mlp + table.reshape(1, 1, -1)
    return tuple(values[:, :, i * c : (i + 1) * c] for i in range(6))


@leaf_function
def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x · (1 + scale) + shift``; ``x`` ``[B, T·S, C]``, the others ``[B, 1 or T, C]``."""
    return x * (per_token(scale, x) + 1) + per_token(shift, x)


@leaf_function
def gated(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x + gate · y``; ``x``, ``y`` ``[B, T·S, C]``, ``gate`` ``[B, 1 or T, C]``."""
    return x + per_token(gate, x) * y


def per_token(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Spread one value a frame over the frame's tokens; one value for all frames broadcasts as it is."""
    b, frames, c = value.shape
    if frames == 1:
        return value
    tokens = x.shape[1] // frames
    return value.reshape(b, frames, 1, c).expand(b, frames, tokens, c).reshape(b, frames * tokens, c)


@leaf_function
def select_frames(x_mask: torch.Tensor, t: torch.Tensor, t0: torch.Tensor) -> torch.Tensor:
    """Per frame ``t`` where ``x_mask`` ``[B, T]`` is 1 and ``t0`` where it is 0; ``t``, ``t0`` ``[B, 1, C]``."""
    m = x_mask.reshape(x_mask.shape[0], -1, 1)
    return t * m + t0 * (1 - m)
