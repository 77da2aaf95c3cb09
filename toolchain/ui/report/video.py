"""A bundle's golden video as a data URI that a browser plays."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle

LIMIT_BYTES = 3_000_000
"""What a video may take of a page; base64 makes a third more of it."""
QUALITIES = (16, 23, 30, 37)
"""CRF of H.264, tried one after the other until a video is small enough. The first is that of ``play``."""


@dataclass(frozen=True)
class Clip:
    """An mp4 as a data URI."""

    uri: str
    width: int
    height: int
    frames: int


def golden_clip(bundle: Bundle) -> Clip | None:
    """The golden video that a bundle carries, encoded; None if it has none.

    Raises:
        BundleError: its file holds no video.
    """
    golden = bundle.manifest.golden
    if golden is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from toolchain.player.video import encode_video

    damaged = f"'{bundle.path}': '{golden.file.path}' holds no video; build the bundle again"
    try:
        pixels = load_file(bundle.path / golden.file.path)["pixels"]
    except (SafetensorError, KeyError) as e:
        raise BundleError(damaged) from e
    if str(pixels.dtype) != "torch.uint8" or pixels.dim() != 4 or pixels.shape[-1] != 3 or min(pixels.shape[:3]) < 2:
        raise BundleError(damaged)
    for crf in QUALITIES:
        file = io.BytesIO()
        encode_video(pixels, bundle.manifest.geometry.fps, file, crf)
        if file.tell() <= LIMIT_BYTES:
            break
    frames, height, width, _ = pixels.shape
    return Clip(f"data:video/mp4;base64,{base64.b64encode(file.getvalue()).decode()}", width, height, frames)
