"""Normalisations.

Source: ``normalization.py`` in coremltools' ``mil/ops/defs``. Where the values are float16 (see ``Engine``),
each step of a formula is rounded, so that one that overflows shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml.ops.registry import operator


def _standardise(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    return centred / (variance + epsilon).sqrt()


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


def _channels(values: Tensor | None, x: Tensor) -> Tensor | None:
    """``values [C]`` shaped to go with ``x [n, C, …]``."""
    return None if values is None else values.reshape(-1, *(1 for _ in range(x.dim() - 2)))


@operator("layer_norm")
def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Over ``axes`` (all by default), which ``gamma`` and ``beta`` have the sizes of."""
    along = sorted(a % x.dim() for a in (range(x.dim()) if axes is None else axes))
    if x.dtype != torch.float16 and along == list(range(along[0], x.dim())):
        return F.layer_norm(x, x.shape[along[0] :], gamma, beta, epsilon)
    sizes = [n if i in along else 1 for i, n in enumerate(x.shape)]
    shaped = (None if v is None else v.reshape(sizes) for v in (gamma, beta))
    return _affine(_standardise(x, along, epsilon), *shaped)


@operator("instance_norm")
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Over the spatial dimensions of ``x [n, C, …]``."""
    along = list(range(2, x.dim()))
    return _affine(_standardise(x, along, epsilon), _channels(gamma, x), _channels(beta, x))


@operator("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """With given statistics ``[C]`` of ``x [n, C, …]``."""
    mean, variance = (v.reshape(-1, *(1 for _ in range(x.dim() - 2))) for v in (mean, variance))
    return _affine((x - mean) / (variance + epsilon).sqrt(), _channels(gamma, x), _channels(beta, x))


@operator("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three dimensions."""
    along = list(range(max(x.dim() - 3, 0), x.dim()))
    return x / (x.square().sum(along, keepdim=True) + epsilon).sqrt()


@operator("local_response_norm")
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Over ``size`` neighbouring channels of ``x [n, C, …]``; the odd one out lies before."""
    before, after = size // 2, math.ceil(size / 2) - 1
    squares = F.pad(x.square().flatten(2), (0, 0, before, after))
    sums = squares.unfold(1, size, 1).sum(-1).reshape(x.shape)
    return x / (k + alpha / size * sums) ** beta
