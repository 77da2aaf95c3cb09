"""Open-Sora v1.2's timesteps, repeated bit for bit: a ``t`` counts from 1000 (noise) down to 0 (video)."""

from __future__ import annotations

import math
from typing import Final

from toolchain.errors import RecipeError
from toolchain.formats.schedule import NUM_TRAIN_TIMESTEPS
from toolchain.ir.rounding import FORMATS, float32, round_to

BASE_PIXELS: Final = 512 * 512  # the resolution at which the timestep transform changes nothing


def timesteps(
    steps: int,
    *,
    height: int,
    width: int,
    frames: int,
    dtype: str = "float32",
    discrete: bool = False,
    transform: bool = True,
    scale: float = 1.0,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> tuple[float, ...]:
    """The official sampler's timesteps, newest noise first: ``steps`` float32 values from 1000 down.

    Args:
        steps: how many denoising steps.
        height, width: of the video, in pixels.
        frames: of the video (not latent frames). What is over after the last 17 is ignored, as officially.
        dtype: ``float32``, ``bfloat16`` or ``float16``: the type that the official script gives height,
            width and frames, the model's. It shifts the values slightly.
        discrete: round to whole timesteps before the transform (the phone app does; official default: no).
        transform: spend more steps at high noise for large videos (official default).
        scale: of the transform's ratio (official default: 1); see :func:`transform_ratio`.
        num_train_timesteps: the timestep that is pure noise.

    Raises:
        RecipeError: a number is out of range, or the official timesteps are not numbers for this geometry.
    """
    for name, value in (("steps", steps), ("height", height), ("width", width), ("frames", frames)):
        if value < 1:
            raise RecipeError(f"{name} is {value}; it must be at least 1")
    if dtype not in FORMATS:
        raise RecipeError(f"dtype of the timesteps is '{dtype}'; choose one of {', '.join(FORMATS)}")
    linear = [(1.0 - i / steps) * num_train_timesteps for i in range(steps)]
    linear = [float32(round(t) if discrete else t) for t in linear]
    if not transform:
        return tuple(linear)
    ratio = transform_ratio(height, width, frames, dtype, scale)
    slope = round_to(ratio - 1.0, FORMATS[dtype])
    shifted = []
    for t in linear:
        u = float32(t / num_train_timesteps)
        fraction = float32(float32(ratio * u) / float32(1.0 + float32(slope * u)))
        shifted.append(float32(fraction * num_train_timesteps))
    return tuple(shifted)


def transform_ratio(height: int, width: int, frames: int, dtype: str = "float32", scale: float = 1.0) -> float:
    """r of the transform t' = r·t / (1 + (r - 1)·t), in ``dtype``: √(h·w / 512²) · √(latent frames) · ``scale``.

    More than 1 spends more steps at high noise, less than 1 at low noise.

    Raises:
        RecipeError: the official ratio is not a number for this geometry.
    """
    if 2 <= frames <= 16:
        raise RecipeError(
            f"frames is {frames}: the official timesteps are not a number for 2 to 16 frames; use 1 or at least 17"
        )
    to = FORMATS[dtype]
    h, w, f = (round_to(v, to) for v in (height, width, frames))
    pixels = round_to(h * w, to)
    if not (math.isfinite(pixels) and math.isfinite(f)):
        raise RecipeError(
            f"{height}x{width}, {frames} frames: the official timesteps are not a number in {dtype}, "
            f"which ends at {to.largest:g}; use float32 or bfloat16"
        )
    space = round_to(math.sqrt(round_to(pixels / BASE_PIXELS, to)), to)
    latent_frames = 1.0 if f == 1 else round_to(round_to(f // 17, to) * 5, to)
    ratio = round_to(space * round_to(math.sqrt(latent_frames), to), to)
    return round_to(float32(ratio * float32(scale)), to)
