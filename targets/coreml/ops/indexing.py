"""Gathering and scattering.

Source: ``scatter_gather.py`` in coremltools' ``mil/ops/defs``. Negative indices count from the end, as in
iOS 15; from iOS 17 on they are out of bounds, which ``validate_indices`` reports and is undefined without.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from targets.coreml.ops.registry import operator

_REDUCTIONS = {"add": "sum", "sub": "sum", "mul": "prod", "div": "prod", "max": "amax", "min": "amin"}


def _checked(indices: Tensor, size: int, validate: bool) -> Tensor:
    """Indices from 0 to ``size - 1``.

    Raises:
        IndexError: one is out of bounds.
    """
    low, high = (int(indices.min()), int(indices.max())) if indices.numel() else (0, 0)
    if high >= size or low < (0 if validate else -size):
        raise IndexError(f"index {high if high >= size else low} is out of bounds for size {size}")
    return indices.long() % size


@operator("gather", moves=True)
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """``x``'s slices along ``axis``: ``[*x[:axis], *indices[batch_dims:], *x[axis + 1:]]``."""
    axis %= x.dim()
    batch_dims %= indices.dim() + 1
    at = _checked(indices, x.shape[axis], validate_indices)
    if not batch_dims:
        sizes = (*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])
        return x.index_select(axis, at.flatten()).reshape(sizes)
    rows = [gather(row, own, axis - 1, batch_dims - 1) for row, own in zip(x, at, strict=True)]
    return torch.stack(rows)


@operator("gather_along_axis", moves=True)
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    """The result has the shape of ``indices``."""
    at = _checked(indices, x.shape[axis], validate_indices)
    return torch.take_along_dim(x, at, axis)


def _flat(x: Tensor, indices: Tensor, batch_dims: int, validate: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Indices ``[…, K]`` into the first ``K`` dimensions after the batch as indices into these, flattened."""
    sizes = x.shape[batch_dims : batch_dims + indices.shape[-1]]
    at = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for size, part in zip(sizes, indices.unbind(-1), strict=True):
        at = at * size + _checked(part, size, validate)
    return at, tuple(x.shape[batch_dims + indices.shape[-1] :])


@operator("gather_nd", moves=True)
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """``indices [*batch, …, K]`` into the ``K`` dimensions of ``x`` that follow the batch."""
    at, rest = _flat(x, indices, batch_dims, validate_indices)
    batch = x.shape[:batch_dims]
    rows = x.reshape(math.prod(batch), -1, *rest)
    own = at.reshape(math.prod(batch), -1)
    found = rows[torch.arange(len(rows))[:, None], own]
    return found.reshape(*at.shape, *rest)


def _scatter(data: Tensor, axis: int, at: Tensor, updates: Tensor, mode: str) -> Tensor:
    """``at`` has the shape of ``updates``."""
    if mode == "update":
        return data.scatter(axis, at, updates)
    if mode not in _REDUCTIONS:
        raise ValueError(f"mode {mode} is unknown")
    updates = -updates if mode == "sub" else updates.reciprocal() if mode == "div" else updates
    return data.scatter_reduce(axis, at, updates.to(data.dtype), _REDUCTIONS[mode])


@operator("scatter")
def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """``indices [N]`` are places along ``axis``, of which ``updates`` has ``N``."""
    at = _checked(indices, data.shape[axis], validate_indices)
    at = at.reshape([-1 if i == axis % data.dim() else 1 for i in range(data.dim())]).expand(updates.shape)
    return _scatter(data, axis, at, updates, mode)


@operator("scatter_along_axis")
def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """``indices`` and ``updates`` have one shape."""
    return _scatter(data, axis, _checked(indices, data.shape[axis], validate_indices), updates, mode)


@operator("scatter_nd")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """``indices […, K]`` into the first ``K`` dimensions of ``data``."""
    at, rest = _flat(data, indices, 0, validate_indices)
    rows = data.reshape(-1, math.prod(rest))
    places = at.reshape(-1, 1).expand(-1, math.prod(rest))
    return _scatter(rows, 0, places, updates.reshape(places.shape), mode).reshape(data.shape)


@operator("non_zero", moves=True)
def non_zero(x: Tensor) -> Tensor:
    """Indices ``[N, R]`` of what is not zero."""
    return x.nonzero()
