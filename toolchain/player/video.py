"""Frames to files: mp4 through PyAV, PNG through Pillow. Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import torch

from toolchain.errors import RecipeError
from toolchain.system.files import check_file, check_folder, whole_file


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """``[F, 3, H, W]`` in -1 … 1 to uint8 ``[F, H, W, 3]``, rounded and clipped as the official code does."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5 + 0.5
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def check_outputs(video: Path, frames: Path | None, trace: Path | None) -> None:
    """Refuse, before any work is done, what cannot be written.

    Raises:
        RecipeError: the video is not an .mp4, or a path is a folder where a file is meant or the reverse.
        ResourceError: a folder does not exist or cannot be written.
    """
    if video.suffix != ".mp4" or video.is_dir():
        raise RecipeError(f"-o {video}: expected the name of an .mp4 file")
    if trace is not None:
        check_file("--trace", trace)
    if frames is not None and frames.exists() and not frames.is_dir():
        raise RecipeError(f"--frames {frames}: expected the name of a folder")
    check_folder("-o", video)
    if frames is not None:
        check_folder("--frames", frames)


def write_video(frames: torch.Tensor, fps: int, path: Path) -> None:
    """Write uint8 frames ``[F, H, W, 3]`` as H.264."""
    with whole_file(path) as partial:
        encode_video(frames, fps, str(partial))


def encode_video(frames: torch.Tensor, fps: int, place: str | BinaryIO, crf: int = 16) -> None:
    """Write uint8 frames ``[F, H, W, 3]`` as H.264 in mp4; the higher ``crf``, the fewer bytes and the coarser."""
    import av

    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2  # 4:2:0 wants even sizes
    with av.open(place, "w", format="mp4") as container:
        # several threads write other bytes on every run
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames[:, :height, :width].numpy():
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_frames(frames: torch.Tensor, folder: Path) -> None:
    """Write uint8 frames ``[F, H, W, 3]`` as ``000.png``, …"""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames.numpy()):
        Image.fromarray(frame).save(folder / f"{i:03d}.png")
