"""Blocks of pixels, pooling and resizing of the last dimensions.

Source: ``pool.py``, ``image_resizing.py`` and ``tensor_transformation.py`` in coremltools' ``mil/ops/defs``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from targets.coreml.ops.registry import operator


@operator("pixel_shuffle", moves=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@operator("pixel_unshuffle", moves=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@operator("depth_to_space", moves=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """``[n, C, H, W]``; the block's place is the outer part of the channel."""
    n, c, h, w = x.shape
    b = block_size
    x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // (b * b), h * b, w * b)


@operator("space_to_depth", moves=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """The inverse of :func:`depth_to_space`."""
    n, c, h, w = x.shape
    b = block_size
    x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


@operator("space_to_batch", moves=True)
def space_to_batch(x: Tensor, block_shape: list[int], paddings: list[list[int]]) -> Tensor:
    """``[n, C, H, W]``, padded with zeros; the block's place is the outer part of the batch."""
    x = F.pad(x, [*paddings[1], *paddings[0]])
    (n, c, h, w), (a, b) = x.shape, block_shape
    x = x.reshape(n, c, h // a, a, w // b, b).permute(3, 5, 0, 1, 2, 4)
    return x.reshape(n * a * b, c, h // a, w // b)


@operator("batch_to_space", moves=True)
def batch_to_space(x: Tensor, block_shape: list[int], crops: list[list[int]]) -> Tensor:
    """The inverse of :func:`space_to_batch`."""
    (n, c, h, w), (a, b) = x.shape, block_shape
    x = x.reshape(a, b, n // (a * b), c, h, w).permute(2, 3, 4, 0, 5, 1)
    return crop(x.reshape(n // (a * b), c, h * a, w * b), *crops)


@operator("crop", moves=True)
def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    height, width = x.shape[-2:]
    return x[..., crop_height[0] : height - crop_height[1], crop_width[0] : width - crop_width[1]]


def same_padding(sizes: list[int], kernel: list[int], strides: list[int], lower: bool) -> list[int]:
    """Padding that makes ``ceil(size / stride)`` of every size, as before and after of each."""
    pads = []
    for size, width, stride in zip(sizes, kernel, strides, strict=True):
        total = max(0, stride * math.ceil(size / stride) - size + width - stride)
        small, large = total // 2, total - total // 2
        pads += [large, small] if lower else [small, large]
    return pads


def _windows(
    x: Tensor,
    kernel: list[int],
    pad_type: str,
    strides: list[int] | None,
    pad: list[int] | None,
    ceil_mode: bool,
    value: float,
) -> tuple[Tensor, Tensor]:
    """Windows ``[n, C, …, window]`` of ``x``, padded with ``value``; and which of their values lie in ``x``."""
    sizes = list(x.shape[2:])
    steps = strides or [1] * len(sizes)
    pads = list(pad or [0] * 2 * len(sizes)) if pad_type == "custom" else [0] * 2 * len(sizes)
    if pad_type.startswith("same"):
        pads = same_padding(sizes, kernel, steps, pad_type == "same_lower")
    elif ceil_mode:
        for i, (size, width, step) in enumerate(zip(sizes, kernel, steps, strict=True)):
            total = size + pads[2 * i] + pads[2 * i + 1]
            count = -(-(total - width) // step) + 1
            if (count - 1) * step >= size + pads[2 * i]:
                count -= 1
            pads[2 * i + 1] += max(0, (count - 1) * step + width - total)
    last_first = [n for i in reversed(range(len(sizes))) for n in pads[2 * i : 2 * i + 2]]
    inside = F.pad(torch.ones(sizes, dtype=torch.bool), last_first)
    x = F.pad(x, last_first, value=value)
    for i, (width, step) in enumerate(zip(kernel, steps, strict=True)):
        x, inside = x.unfold(2 + i, width, step), inside.unfold(i, width, step)
    return x.flatten(2 + len(sizes)), inside.flatten(len(sizes))


@operator("max_pool", moves=True)
def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    return _windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode, -math.inf)[0].amax(-1)


@operator("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    windows, inside = _windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode, 0)
    return windows.sum(-1) / (inside.sum(-1) if exclude_padding_from_average else math.prod(kernel_sizes))


@operator("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    windows, _ = _windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode, 0)
    return windows.square().sum(-1).sqrt()


def _nearest(x: Tensor, axis: int, size: int) -> Tensor:
    """``axis`` is counted from the end."""
    times, rest = divmod(size, x.shape[axis])
    if times and not rest:  # an index takes five times as long to follow
        return (
            x.unsqueeze(axis).expand(*x.shape[:axis], x.shape[axis], times, *x.shape[axis:][1:]).flatten(axis - 1, axis)
        )
    at = (torch.arange(size) * x.shape[axis]).div(size, rounding_mode="floor")
    return x.index_select(axis, at)


def _grid(before: int, after: int, mode: str) -> Tensor:
    """Where ``after`` samples of ``before`` values lie, from 0 to ``before - 1``."""
    i = torch.arange(after, dtype=torch.float64)
    if mode in ("ALIGN_CORNERS", "STRICT_ALIGN_CORNERS"):
        if after == 1:
            return torch.full((1,), (before - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0, dtype=torch.float64)
        return i * (before - 1) / (after - 1)
    if mode == "DEFAULT":
        at = i * before / after
    elif mode == "OFFSET_CORNERS":
        at = (i + 0.5) * max(1, before - 1) / after
    elif mode == "UNALIGN_CORNERS":
        at = (i + 0.5) * before / after - 0.5
    else:
        raise ValueError(f"sampling_mode {mode} is unknown")
    return at.clamp(0, before - 1)


def _linear(x: Tensor, axis: int, size: int, mode: str) -> Tensor:
    at = _grid(x.shape[axis], size, mode)
    low = at.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    part = (at - low).to(x.dtype).reshape(-1, *(1 for _ in range(-axis - 1)))
    return x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part


def _scaled(x: Tensor, height: float, width: float) -> tuple[int, int]:
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


@operator("upsample_nearest_neighbor", moves=True)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return _nearest(_nearest(x, -1, width), -2, height)  # the smaller tensor is made of single numbers


@operator("resize_nearest_neighbor", moves=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _nearest(_nearest(x, -1, target_size_width), -2, target_size_height)


@operator("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return _linear(_linear(x, -2, target_size_height, sampling_mode), -1, target_size_width, sampling_mode)


@operator("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    uncentred = "DEFAULT" if half_pixel_centers is False else "UNALIGN_CORNERS"
    return resize_bilinear(x, height, width, "STRICT_ALIGN_CORNERS" if align_corners else uncentred)
