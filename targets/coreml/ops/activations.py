"""Activations, elementwise but for ``softmax``.

Source: ``activation.py`` in coremltools' ``mil/ops/defs``. Where the values are float16 (see ``Engine``),
each step of a formula is rounded, so that one that overflows shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml.ops.registry import operator

_TANH_SCALE = math.sqrt(2 / math.pi)


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values [C]`` shaped to go with ``x [B, C, …]``."""
    return values.reshape(-1, *(1 for _ in range(x.dim() - 2)))


@operator("relu")
def relu(x: Tensor) -> Tensor:
    return x.relu()


@operator("relu6")
def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


@operator("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@operator("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


@operator("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@operator("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """``alpha [C]`` goes with ``x [B, C, …]``."""
    return torch.where(x > 0, x, _by_channel(alpha, x) * x)


@operator("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * x.clamp(max=0).expm1())


@operator("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * (1.702 * x).sigmoid()
    if x.dtype != torch.float16:
        return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")
    if mode == "EXACT":
        return 0.5 * x * (1 + (x / math.sqrt(2)).erf())
    return 0.5 * x * (1 + (_TANH_SCALE * (x + 0.044715 * (x * x * x))).tanh())


@operator("silu")
def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid() if x.dtype == torch.float16 else F.silu(x)


@operator("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    return x.sigmoid()


@operator("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@operator("softplus")
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@operator("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha`` and ``beta [C]`` go with ``x [B, C, …]``."""
    return _by_channel(alpha, x) * softplus(_by_channel(beta, x) * x)


@operator("softsign")
def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@operator("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * (beta * x).tanh()


@operator("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@operator("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    if x.dtype != torch.float16:
        return x.softmax(axis)
    powers = (x - x.amax(axis, keepdim=True)).exp()
    return powers / powers.sum(axis, keepdim=True)
