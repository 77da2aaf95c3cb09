"""Weights stored compressed, and values quantized.

Source: ``iOS16/constexpr_ops.py``, ``iOS17/quantization_ops.py`` and ``iOS18/compression.py`` in coremltools'
``mil/ops/defs``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from targets.coreml.dtypes import DTYPES
from targets.coreml.ops.registry import operator
from targets.coreml.values import unpack


def _float(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _spread(x: Tensor, shape: torch.Size) -> Tensor:
    """Repeat every value of ``x`` to blocks that fill ``shape``."""
    for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)):
        if want % have:
            raise ValueError(f"{list(x.shape)} does not divide {list(shape)}")
        if have not in (1, want):
            x = x.repeat_interleave(want // have, axis)
    return x


def _along(x: Tensor, like: Tensor, axis: int) -> Tensor:
    """A scalar, or a vector along ``axis`` of ``like``."""
    return x if x.dim() == 0 else x.reshape([-1 if i == axis % like.dim() else 1 for i in range(like.dim())])


@operator("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """``scale * (data - offset)``, each value of ``scale`` and ``offset`` for one block of ``data``."""
    values = data.to(scale.dtype, copy=True)
    if offset is not None:
        values -= _spread(offset.to(scale.dtype), data.shape)
    return values.mul_(_spread(scale, data.shape))


@operator("constexpr_lut_to_dense", moves=True)
def lut_to_dense(
    indices: Tensor, lut: Tensor, vector_axis: int | None = None, shape: list[int] | None = None
) -> Tensor:
    """Look ``indices`` up in tables.

    iOS 18: ``lut [*groups, entries, vector]``, a table for each block of ``indices``; the vectors fill
    ``vector_axis``. iOS 16: one table ``lut [entries]`` and ``indices`` packed into bytes, of ``shape``.
    """
    if shape is not None:
        bits = DTYPES[f"uint{int(math.log2(len(lut)))}"]
        return lut[unpack(indices.numpy(), bits, math.prod(shape)).long()].reshape(shape)
    *groups, entries, vector = lut.shape
    tables = lut.reshape(-1, vector)
    if math.prod(groups) > 1:
        numbers = torch.arange(math.prod(groups), dtype=torch.int32).reshape(groups)
        at = _spread(numbers, indices.shape) * entries + indices
    else:
        at = indices.to(torch.int32)
    dense = tables.index_select(0, at.flatten()).reshape(*indices.shape, vector)
    axis = (vector_axis or 0) % indices.dim()
    return dense.squeeze(-1) if vector == 1 else dense.movedim(-1, axis + 1).flatten(axis, axis + 1)


@operator("constexpr_sparse_to_dense", moves=True)
def sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """Put values where ``mask`` is set, zeros elsewhere; iOS 16 has ``mask`` packed into bytes, of ``shape``."""
    if shape is not None:
        mask = unpack(mask.numpy(), DTYPES["uint1"], math.prod(shape)).reshape(shape)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.bool()] = nonzero_data
    return dense


@operator("constexpr_lut_to_sparse", moves=True)
def lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`lut_to_dense` of what ``indices_mask`` sets: the mask of the result, and its values."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask if lut.shape[-1] == 1 else indices_mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask.bool()]


@operator("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`blockwise_shift_scale` of what ``data_mask`` sets: the mask, and the values."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]


@operator("constexpr_affine_dequantize")
def affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``scale * (data - zero_point)``, per tensor or along ``axis``."""
    return dequantize(quantized_data, scale, zero_point, axis)


@operator("constexpr_cast", moves=True)
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val.float()


@operator("dequantize")
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = 0) -> Tensor:
    """``scale * (input - zero_point)``, per tensor or along ``axis``."""
    values = input.float()
    if zero_point is not None:
        values = values - _along(zero_point.float(), input, axis)
    return values * _along(scale, input, axis)


@operator("quantize", moves=True)
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int = 0
) -> Tensor:
    """``clip(round(input / scale) + zero_point)``, per tensor or along ``axis``."""
    limits = np.iinfo(output_dtype)
    values = (input.float() / _along(scale.float(), input, axis)).round()
    if zero_point is not None:
        values = values + _along(zero_point.float(), input, axis)
    return values.clamp(int(limits.min), int(limits.max))
