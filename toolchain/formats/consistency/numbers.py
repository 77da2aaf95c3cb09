"""Numbers of a manifest by themselves: no size below one, none beyond what any video or tensor has."""

from __future__ import annotations

import math
from typing import Any, Final

from toolchain.formats.manifest import Manifest
from toolchain.ir.dtypes import DTYPES

MOST_BYTES: Final = 1 << 36
"""Of one tensor: 64 GiB, more than a device that plays bundles has."""
MOST_FPS: Final = 1000
MOST_SCALE: Final = 64
"""Frames, rows or columns that one of a latent may stand for; autoencoders of videos have 4 to 32."""
SEEDS: Final = 1 << 64


def check_finite(data: Any, where: str = "") -> None:
    """Refuse plain data with a number that is NaN or infinite.

    Raises:
        ValueError: names its key.
    """
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{where}: {data} is NaN or infinite")
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        check_finite(value, f"{where}.{key}" if where else str(key))


def check_shape(where: str, shape: list[int], dtype: str) -> None:
    """Refuse a shape that no tensor has, or only one that fits no device.

    Raises:
        ValueError: says which.
    """
    if any(n < 1 for n in shape):
        raise ValueError(f"{where}: shape {shape} has a size below 1")
    bytes_ = math.prod(shape) * DTYPES[dtype].bytes
    if bytes_ > MOST_BYTES:
        raise ValueError(f"{where}: shape {shape} takes {bytes_} bytes; the most that is played is {MOST_BYTES}")


def check_numbers(manifest: Manifest) -> None:
    """Hold geometry, seeds and limits against what they can be.

    Raises:
        ValueError: names the key.
    """
    g = manifest.geometry
    for name, value in g:
        if value < 1:
            raise ValueError(f"geometry.{name}: {value} is below 1")
    for name in ("frames", "height", "width"):
        latent, value = getattr(g, f"latent_{name}"), getattr(g, name)
        if not latent <= value <= MOST_SCALE * latent:
            raise ValueError(
                f"geometry.{name}: {value} does not go with latent_{name} {latent}; one latent stands for 1 to "
                f"{MOST_SCALE} of them"
            )
    if g.fps > MOST_FPS:
        raise ValueError(f"geometry.fps: {g.fps} is over {MOST_FPS}")
    latents = [1, g.latent_channels, g.latent_frames, g.latent_height, g.latent_width]
    check_shape("geometry: latents", latents, "float32")
    check_shape("geometry: pixels", [g.frames, 3, g.height, g.width], "float32")
    if manifest.memory_budget_bytes is not None and manifest.memory_budget_bytes < 1:
        raise ValueError(f"memory_budget_bytes: {manifest.memory_budget_bytes} is below 1")
    gate, golden = manifest.gate, manifest.golden
    if gate.inputs < 0:
        raise ValueError(f"gate.inputs: {gate.inputs} is below 0")
    if wrong := sorted(name for name, limit in gate.limits.items() if limit < 0):
        raise ValueError(f"gate.limits.{wrong[0]}: {gate.limits[wrong[0]]} is below 0")
    for where, seed in (("gate.seed", gate.seed), ("golden.seed", golden.seed if golden is not None else 0)):
        if not 0 <= seed < SEEDS:
            raise ValueError(f"{where}: {seed} is not 0 to 2^64 - 1")
    if golden is not None and golden.psnr_db < golden.limit_db:
        raise ValueError(f"golden.psnr_db: {golden.psnr_db} is below limit_db {golden.limit_db}")
