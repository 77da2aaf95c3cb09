"""Translations of operators whose usual ones ONNX Runtime refuses, or is slow to load."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import opset23 as op

OPSET = 23
"""The first version with attention and RMS norm as operators."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of ``[G, h, N, d]``; a mask gets a row for every query, as the runtime does not broadcast it."""
    if attn_mask is not None:
        attn_mask = op.Expand(attn_mask, op.Constant(value_ints=[1, 1, query.shape[2], 1]))
    result, *_ = op.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))
    return result


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """``input · weightᵀ + bias`` as one operator that takes the weight as checkpoints store it.

    A product with the transposed weight would have the runtime turn every weight over when it loads them.
    """
    *leading, width = input.shape
    if len(leading) == 1:
        return op.Gemm(input, weight, bias, transB=1)
    rows = op.Reshape(input, op.Constant(value_ints=[math.prod(leading), width]))
    result = op.Gemm(rows, weight, bias, transB=1)
    return op.Reshape(result, op.Constant(value_ints=[*leading, weight.shape[0]]))


def convolution(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """A convolution in any number of dimensions; one without a bias stays so, instead of getting zeros for it."""
    strides, pads, dilations = (_each(v, len(weight.shape) - 2) for v in (stride, padding, dilation))
    return op.Conv(input, weight, bias, strides=strides, pads=[*pads, *pads], dilations=dilations, group=groups)


def _each(values: Sequence[int], dimensions: int) -> list[int]:
    """One value a dimension; a single one stands for all."""
    return list(values) * (dimensions if len(values) == 1 else 1)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.conv2d.default: convolution,
    torch.ops.aten.conv3d.default: convolution,
}
