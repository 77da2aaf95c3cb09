"""Operators that coremltools has no NumPy definition of, written from their docstrings, element by element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Arguments = Mapping[str, Any]
Array = np.ndarray


def places(shape: Any) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(n) for n in shape))


def tuples(values: Any, size: int, default: int = 1) -> list[int]:
    return list(values) if values is not None else [default] * size


# --- convolution and pooling -------------------------------------------------------------------------


def padding(sizes: Any, kernel: Any, strides: Any, kind: str, pad: Any) -> list[tuple[int, int]]:
    """Before and after of every dimension; ``same`` gives ceil(size / stride) outputs."""
    if kind == "custom":
        return [(pad[2 * i], pad[2 * i + 1]) for i in range(len(sizes))]
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    pads = []
    for n, k, s in zip(sizes, kernel, strides, strict=True):
        total = max(0, (math.ceil(n / s) - 1) * s + k - n)
        pads.append((total - total // 2, total // 2) if kind == "same_lower" else (total // 2, total - total // 2))
    return pads


def conv(a: Arguments) -> Array:
    x, w, groups = a["x"].astype(np.float64), a["weight"].astype(np.float64), a.get("groups", 1)
    rank = x.ndim - 2
    strides, dilations = tuples(a.get("strides"), rank), tuples(a.get("dilations"), rank)
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads = padding(x.shape[2:], reach, strides, a.get("pad_type", "valid"), a.get("pad"))
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    out = np.zeros((len(x), len(w), *sizes))
    per_in, per_out = w.shape[1], len(w) // groups
    for o in places(sizes):
        for k in places(w.shape[2:]):
            at = tuple(o[i] * strides[i] + k[i] * dilations[i] for i in range(rank))
            for g in range(groups):
                own = x[(slice(None), slice(g * per_in, (g + 1) * per_in), *at)]
                rows = slice(g * per_out, (g + 1) * per_out)
                out[(slice(None), rows, *o)] += own @ w[(rows, slice(None), *k)].T
    bias = a.get("bias", np.zeros(len(w)))
    return (out + bias.reshape(-1, *[1] * rank)).astype(np.float32)


def conv_transpose(a: Arguments) -> Array:
    x, w, groups = a["x"].astype(np.float64), a["weight"].astype(np.float64), a.get("groups", 1)
    rank = x.ndim - 2
    strides, dilations = tuples(a.get("strides"), rank), tuples(a.get("dilations"), rank)
    whole = [
        (n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], strides, w.shape[2:], dilations, strict=True)
    ]
    out = np.zeros((len(x), w.shape[1] * groups, *whole))
    per_in, per_out = x.shape[1] // groups, w.shape[1]
    for i in places(x.shape[2:]):
        for k in places(w.shape[2:]):
            at = tuple(i[j] * strides[j] + k[j] * dilations[j] for j in range(rank))
            for g in range(groups):
                rows = slice(g * per_in, (g + 1) * per_in)
                out[(slice(None), slice(g * per_out, (g + 1) * per_out), *at)] += (
                    x[(slice(None), rows, *i)] @ w[(rows, slice(None), *k)]
                )
    kind = a.get("pad_type", "valid")
    for i in range(rank):
        before, after = (a["pad"][2 * i], a["pad"][2 * i + 1]) if kind == "custom" else (0, 0)
        if kind == "same":
            extra = whole[i] - x.shape[2 + i] * strides[i]
            before, after = extra // 2, extra - extra // 2
        out = out.take(range(before, whole[i] - after), axis=2 + i)
    return (out + a.get("bias", np.zeros(out.shape[1])).reshape(-1, *[1] * rank)).astype(np.float32)


def pool(reduce: Callable[[Array, int], float], value: float = 0.0) -> Callable[[Arguments], Array]:
    def run(a: Arguments) -> Array:
        x, kernel = a["x"], a["kernel_sizes"]
        rank = len(kernel)
        strides = tuples(a.get("strides"), rank)
        pads = padding(x.shape[2:], kernel, strides, a["pad_type"], a.get("pad"))
        sizes = []
        for i in range(rank):
            span = x.shape[2 + i] + sum(pads[i]) - kernel[i]
            size = (math.ceil if a.get("ceil_mode") else math.floor)(span / strides[i]) + 1
            late = (size - 1) * strides[i] >= x.shape[2 + i] + pads[i][0]
            sizes.append(size - 1 if a.get("ceil_mode") and late else size)
        out = np.zeros((*x.shape[:2], *sizes), np.float32)
        for o in places(sizes):
            starts = [o[i] * strides[i] - pads[i][0] for i in range(rank)]
            window = [slice(max(s, 0), s + k) for s, k in zip(starts, kernel, strict=True)]
            for c in places(x.shape[:2]):
                inside = x[(*c, *window)].ravel()
                counted = len(inside) if a.get("exclude_padding_from_average") else math.prod(kernel)
                out[(*c, *o)] = reduce(inside, counted)
        return out

    return run


POOLS = {
    "max_pool": pool(lambda inside, n: inside.max()),
    "avg_pool": pool(lambda inside, n: inside.sum() / n),
    "l2_pool": pool(lambda inside, n: math.sqrt((inside.astype(np.float64) ** 2).sum())),
}


# --- moving values -----------------------------------------------------------------------------------


def moved(shape: Any, source: Callable[[tuple[int, ...]], float], dtype: Any = np.float32) -> Array:
    """An array whose every element is looked up."""
    out = np.zeros(shape, dtype)
    for at in places(shape):
        out[at] = source(at)
    return out


def depth_to_space(a: Arguments) -> Array:
    x, b = a["x"], a["block_size"]
    n, c, h, w = x.shape
    depth = c // b**2
    return moved(
        (n, depth, h * b, w * b), lambda o: x[o[0], (o[2] % b * b + o[3] % b) * depth + o[1], o[2] // b, o[3] // b]
    )


def space_to_depth(a: Arguments) -> Array:
    x, b = a["x"], a["block_size"]
    n, c, h, w = x.shape
    return moved(
        (n, c * b * b, h // b, w // b),
        lambda o: x[o[0], o[1] % c, o[2] * b + o[1] // c // b, o[3] * b + o[1] // c % b],
    )


def pixel_shuffle(a: Arguments) -> Array:
    x, f = a["x"], a["upscale_factor"]
    n, c, h, w = x.shape
    return moved(
        (n, c // f**2, h * f, w * f), lambda o: x[o[0], o[1] * f * f + o[2] % f * f + o[3] % f, o[2] // f, o[3] // f]
    )


def pixel_unshuffle(a: Arguments) -> Array:
    x, f = a["x"], int(a["downscale_factor"])
    n, c, h, w = x.shape
    return moved(
        (n, c * f * f, h // f, w // f),
        lambda o: x[o[0], o[1] // f**2, o[2] * f + o[1] % f**2 // f, o[3] * f + o[1] % f],
    )


def space_to_batch(a: Arguments) -> Array:
    x, (p, q) = np.pad(a["x"], [(0, 0), (0, 0), *a["paddings"]]), a["block_shape"]
    n, c, h, w = x.shape
    return moved(
        (n * p * q, c, h // p, w // q), lambda o: x[o[0] % n, o[1], o[2] * p + o[0] // n // q, o[3] * q + o[0] // n % q]
    )


def batch_to_space(a: Arguments) -> Array:
    x, (p, q), ((top, bottom), (left, right)) = a["x"], a["block_shape"], a["crops"]
    n, c, h, w = x.shape[0] // (p * q), *x.shape[1:]
    whole = moved((n, c, h * p, w * q), lambda o: x[(o[2] % p * q + o[3] % q) * n + o[0], o[1], o[2] // p, o[3] // q])
    return whole[:, :, top : h * p - bottom, left : w * q - right]


def interpolated(x: Array, height: int, width: int, grid: Callable[[int, int, int], float]) -> Array:
    def sample(at: tuple[int, ...]) -> float:
        total = 0.0
        y, z = grid(x.shape[-2], height, at[-2]), grid(x.shape[-1], width, at[-1])
        for dy, dz in itertools.product((0, 1), (0, 1)):
            row, column = math.floor(y) + dy, math.floor(z) + dz
            part = (1 - abs(y - row)) * (1 - abs(z - column))
            total += part * x[(*at[:-2], row, column)] if part else 0.0
        return total

    return moved((*x.shape[:-2], height, width), sample)


def clamped(at: float, n: int) -> float:
    return min(n - 1, max(0, at))


GRIDS: Mapping[str, Callable[[int, int, int], float]] = {
    "STRICT_ALIGN_CORNERS": lambda n, m, i: clamped(i * (n - 1) / (m - 1), n) if m > 1 else 0,
    "ALIGN_CORNERS": lambda n, m, i: clamped(i * (n - 1) / (m - 1), n) if m > 1 else (n - 1) / 2,
    "DEFAULT": lambda n, m, i: clamped(i * (n - n / m) / (m - 1), n) if m > 1 else 0,
    "OFFSET_CORNERS": lambda n, m, i: clamped((0.5 + i) * max(1, n - 1) / m, n),
    "UNALIGN_CORNERS": lambda n, m, i: clamped(i * n / m + 0.5 * n / m - 0.5, n),
}


def upsample_bilinear(a: Arguments) -> Array:
    x = a["x"]
    height, width = int(x.shape[-2] * a["scale_factor_height"]), int(x.shape[-1] * a["scale_factor_width"])
    corners = a.get("align_corners", True)
    centred = a.get("half_pixel_centers", not corners)
    mode = "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS" if centred else "DEFAULT"
    return interpolated(x, height, width, GRIDS[mode])


def nearest(x: Array, height: int, width: int) -> Array:
    return moved(
        (*x.shape[:-2], height, width),
        lambda o: x[(*o[:-2], o[-2] * x.shape[-2] // height, o[-1] * x.shape[-1] // width)],
    )


def sliding_windows(a: Arguments) -> Array:
    x, axis, size, stride = a["x"], a["axis"] % a["x"].ndim, a["size"], a.get("stride", 1)
    windows = range(0, x.shape[axis] - size + 1, stride)
    return np.stack([x.take(range(s, s + size), axis) for s in windows], axis)


def reverse_sequence(a: Arguments) -> Array:
    out = a["x"].copy()
    for i, n in enumerate(a["lengths"]):
        row = out.take(i, a["batch_axis"]) if a["batch_axis"] == 0 else out[:, i]
        row[:n] = row[:n][::-1].copy()
        out[(slice(None),) * a["batch_axis"] + (i,)] = row
    return out


def interleave(a: Arguments) -> Array:
    values, axis = a["values"], a["axis"] % a["values"][0].ndim
    return np.concatenate([v.take([i], axis) for i in range(values[0].shape[axis]) for v in values], axis)


# --- scattering --------------------------------------------------------------------------------------

MODES: Mapping[str, Callable[[float, float], float]] = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": max,
    "min": min,
}


def scattered(a: Arguments, target: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Array:
    out = a["data"].copy()
    for at in places(a["updates"].shape):
        to = target(at)
        out[to] = MODES[a.get("mode", "add")](out[to], a["updates"][at])
    return out


def scatter(a: Arguments) -> Array:
    axis = a.get("axis", 0) % a["data"].ndim
    return scattered(a, lambda at: (*at[:axis], int(a["indices"][at[axis]]), *at[axis + 1 :]))


def scatter_along_axis(a: Arguments) -> Array:
    axis = a.get("axis", 0) % a["data"].ndim
    return scattered(a, lambda at: (*at[:axis], int(a["indices"][at]), *at[axis + 1 :]))


def scatter_nd(a: Arguments) -> Array:
    lead = a["indices"].ndim - 1
    return scattered(a, lambda at: (*map(int, a["indices"][at[:lead]]), *at[lead:]))


def gather_nd(a: Arguments) -> Array:
    x, indices, batch = a["x"], a["indices"], a.get("batch_dims", 0)
    rest = x.shape[batch + indices.shape[-1] :]
    lead = indices.ndim - 1
    return moved((*indices.shape[:-1], *rest), lambda o: x[(*o[:batch], *map(int, indices[o[:lead]]), *o[lead:])])
