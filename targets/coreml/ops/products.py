"""Matrix products, convolutions and attention.

Source: ``linear.py``, ``conv.py`` and ``transformers.py`` in coremltools' ``mil/ops/defs``. Products
accumulate in float32 whatever the values' type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml.ops.activations import softmax
from targets.coreml.ops.images import same_padding
from targets.coreml.ops.registry import operator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x […, D_in]``, ``weight [D_out, D_in]``, ``bias [D_out]``."""
    # of a view that is turned round torch makes a product for each of its first dimension, at four times the cost
    return F.linear(x.contiguous(), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@operator("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
    y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
    return torch.matmul(x, y)


@operator("einsum")
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@operator("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """``x [n, C_in, …]``, ``weight [C_out, C_in / groups, …]``, one to three spatial dimensions."""
    rank = x.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads = [0] * 2 * rank
    if pad_type == "custom":
        pads = pad or pads
    elif pad_type.startswith("same"):
        kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
        pads = same_padding(list(x.shape[2:]), kernel, strides, pad_type == "same_lower")
    before, after = pads[::2], pads[1::2]
    if before != after:
        x = F.pad(x, [n for i in reversed(range(rank)) for n in pads[2 * i : 2 * i + 2]])
        before = [0] * rank
    bias = None if bias is None else bias.to(x.dtype)
    return _CONV[rank](x, weight.to(x.dtype), bias, strides, before, dilations, groups)


@operator("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """``x [n, C_in, …]``, ``weight [C_in, C_out / groups, …]``; ``output_shape`` says where rounding is open."""
    rank = x.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    whole = _CONV_TRANSPOSE[rank](x, weight.to(x.dtype), None, strides, 0, 0, groups, dilations)
    for i in range(rank):
        size = whole.shape[2 + i]
        before, after = (pad[2 * i], pad[2 * i + 1]) if pad and pad_type == "custom" else (0, 0)
        wanted = size - before - after
        if pad_type.startswith("same"):
            wanted = x.shape[2 + i] * strides[i]
        if output_shape is not None:
            wanted = output_shape[2 + i]
        if pad_type.startswith("same"):
            cut = max(0, size - wanted)
            before = -(-cut // 2) if pad_type == "same_lower" else cut // 2
        whole = whole.narrow(2 + i, before, min(wanted, size - before))
        missing = wanted - whole.shape[2 + i]
        whole = F.pad(whole, [0, 0] * (rank - 1 - i) + [0, missing]) if missing else whole
    return whole if bias is None else whole + bias.to(x.dtype).reshape(-1, *(1 for _ in range(rank)))


@operator("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """``query [B, …, L, E]``, ``key [B, …, S, E]``, ``value [B, …, S, EV]``; a bool mask says what takes part."""
    if query.dtype != torch.float16:
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        added = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -math.inf)
        scores = scores + added.to(scores.dtype)
    return softmax(scores) @ value
