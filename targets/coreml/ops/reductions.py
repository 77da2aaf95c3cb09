"""Reductions, sorting and running sums.

Source: ``reduction.py`` and ``tensor_operation.py`` in coremltools' ``mil/ops/defs``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from targets.coreml.ops.registry import operator


def _axes(x: Tensor, axes: list[int] | None) -> list[int]:
    return list(range(x.dim())) if axes is None else axes


def _sum(x: Tensor, axes: list[int] | None, keep_dims: bool) -> Tensor:
    return x.sum(_axes(x, axes), keep_dims, dtype=x.dtype)


@operator("reduce_sum")
def reduce_sum(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _sum(x, axes, keep_dims)


@operator("reduce_mean")
def reduce_mean(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Of float16 the sum is rounded before it is divided."""
    total = _sum(x, axes, keep_dims)
    return torch.div(total, x.numel() // total.numel(), rounding_mode=None if x.is_floating_point() else "trunc")


@operator("reduce_prod")
def reduce_prod(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    for axis in sorted((a % x.dim() for a in _axes(x, axes)), reverse=True):
        x = x.prod(axis, keep_dims, dtype=x.dtype)
    return x


@operator("reduce_max", moves=True)
def reduce_max(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.amax(_axes(x, axes), keep_dims)


@operator("reduce_min", moves=True)
def reduce_min(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.amin(_axes(x, axes), keep_dims)


@operator("reduce_l1_norm")
def reduce_l1_norm(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _sum(x.abs(), axes, keep_dims)


@operator("reduce_l2_norm")
def reduce_l2_norm(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _sum(x.square(), axes, keep_dims).sqrt()


@operator("reduce_sum_square")
def reduce_sum_square(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _sum(x.square(), axes, keep_dims)


@operator("reduce_log_sum")
def reduce_log_sum(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return _sum(x, axes, keep_dims).log()


@operator("reduce_log_sum_exp")
def reduce_log_sum_exp(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.logsumexp(_axes(x, axes), keep_dims)


@operator("reduce_argmax", moves=True)
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmax(axis, keep_dims)


@operator("reduce_argmin", moves=True)
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmin(axis, keep_dims)


@operator("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    sums = x.cumsum(axis, dtype=x.dtype)
    sums = sums - x if exclusive else sums
    return sums.flip(axis) if reverse else sums


@operator("argsort", moves=True)
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return x.argsort(stable=True, dim=axis, descending=not ascending)


@operator("topk", moves=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    """The ``k`` largest, or smallest when ``ascending``; all of them when ``k`` is -1."""
    values, indices = x.sort(dim=axis, descending=not ascending, stable=True)
    count = x.shape[axis] if k == -1 else k
    values, indices = values.narrow(axis, 0, count), indices.narrow(axis, 0, count)
    return (values, indices) if return_indices else values
