"""Shapes: reshaping, slicing, joining, padding and filling.

Source: ``tensor_transformation.py`` and ``tensor_operation.py`` in coremltools' ``mil/ops/defs``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from targets.coreml.ops.registry import operator


@operator("reshape", moves=True)
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """A 0 takes ``x``'s size, counted from the right; where ``x`` has none, 1."""
    offset = x.dim() - len(shape)
    return x.reshape([n or (x.shape[i + offset] if i + offset >= 0 else 1) for i, n in enumerate(shape)])


@operator("reshape_like", moves=True)
def reshape_like(
    x: Tensor, ref_tensors: Sequence[Tensor], begins: list[int], ends: list[int], end_masks: list[bool]
) -> Tensor:
    parts = zip(ref_tensors, begins, ends, end_masks, strict=True)
    return x.reshape([n for ref, begin, end, whole in parts for n in ref.shape[begin : None if whole else end]])


@operator("squeeze", moves=True)
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("expand_dims", moves=True)
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    """``axes`` are places in the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@operator("flatten2d", moves=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("transpose", moves=True)
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@operator("split", moves=True)
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is None:
        assert num_splits is not None
        split_sizes = [x.shape[axis] // num_splits] * num_splits
    return tuple(x.split(split_sizes, axis))


@operator("stack", moves=True)
def stack(values: Sequence[Tensor], axis: int) -> Tensor:
    return torch.stack(list(values), axis)


@operator("concat", moves=True)
def concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """With ``interleave``, the tensors' slices take turns along ``axis``. Scalars make a vector."""
    if not interleave:
        return torch.cat([v.reshape(1) if v.dim() == 0 else v for v in values], axis)
    axis %= values[0].dim()
    return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)


@operator("tile", moves=True)
def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.repeat(reps)


@operator("reverse", moves=True)
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes)


@operator("reverse_sequence", moves=True)
def reverse_sequence(x: Tensor, lengths: list[int], seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Reverse the first ``lengths[i]`` of slice ``i`` of the batch along ``seq_axis``."""
    moved = x.movedim((batch_axis, seq_axis), (0, 1)).clone()
    for row, length in zip(moved, lengths, strict=True):
        row[:length] = row[:length].flip(0)
    return moved.movedim((0, 1), (batch_axis, seq_axis))


def _indices(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> list[range | int]:
    """What a slice takes of each dimension: a range, or one index."""
    none = [False] * x.dim()
    first, last, single = begin_mask or none, end_mask or none, squeeze_mask or none
    taken: list[range | int] = []
    for i, size in enumerate(x.shape):
        if single[i]:
            taken.append(begin[i] % size)
            continue
        step = stride[i] if stride else 1
        taken.append(range(*slice(None if first[i] else begin[i], None if last[i] else end[i], step).indices(size)))
    return taken


def _take(x: Tensor, taken: list[range | int]) -> Tensor:
    axis = 0
    for part in taken:
        if isinstance(part, int):
            x = x.select(axis, part)
            continue
        if part.step > 0:
            index = [slice(None)] * axis + [slice(part.start, max(part.start, part.stop), part.step)]
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(part)))
        axis += 1
    return x


@operator("slice_by_index", moves=True)
def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """NumPy's slicing; a mask says where a bound is left out, or the dimension is indexed away."""
    return _take(x, _indices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask))


@operator("slice_update", moves=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """``x`` with ``update`` at what :func:`slice_by_index` takes."""
    taken = _indices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    grid = torch.arange(x.numel()).reshape(x.shape)
    out = x.clone().flatten()
    out[_take(grid, taken).flatten()] = update.flatten()
    return out.reshape(x.shape)


@operator("slice_by_size", moves=True)
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """A size of -1 takes all that is left."""
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        start %= x.shape[axis]
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


@operator("sliding_windows", moves=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    axis %= x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


@operator("pad", moves=True)
def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """``pad`` has the sizes before and after of the last dimensions, in their order."""
    first = x.dim() - len(pad) // 2
    if mode == "constant":
        last_first = [n for i in range(len(pad) - 2, -1, -2) for n in pad[i : i + 2]]
        return torch.nn.functional.pad(x, last_first, value=constant_val)
    for axis in range(first, x.dim()):
        before, after = pad[2 * (axis - first) : 2 * (axis - first) + 2]
        last = x.shape[axis] - 1
        at = torch.arange(-before, last + 1 + after)
        at = at.clamp(0, last) if mode == "replicate" else last - (last - at.abs()).abs()
        x = x.index_select(axis, at) if before or after else x
    return x


@operator("band_part", moves=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Of the innermost matrices, keep ``lower`` diagonals below and ``upper`` above the main one; -1: all."""
    below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])
    kept = torch.ones_like(below, dtype=torch.bool)
    kept = kept if lower < 0 else kept & (below <= lower)
    kept = kept if upper < 0 else kept & (-below <= upper)
    return torch.where(kept, x, torch.zeros_like(x))


@operator("shape", moves=True)
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operator("fill")
def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.expand(shape).clone()


@operator("fill_like")
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(list(ref_tensor.shape), value)


@operator("range_1d")
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    dtype = end.dtype
    return torch.arange(start.item(), end.item(), step.item(), dtype=dtype)


@operator("one_hot", moves=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """A new dimension at ``axis``, with ``on_value`` where an index says."""
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.zeros_like(on) if off_value is None else off_value
    axis = axis % (indices.dim() + 1)
    sizes = [-1 if i == axis else 1 for i in range(indices.dim() + 1)]
    return torch.where(indices.unsqueeze(axis) == torch.arange(one_hot_vector_size).reshape(sizes), on, off)
