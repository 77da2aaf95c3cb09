"""A whole video, held against the eager pipeline's: when a bundle is built, and whenever it is verified."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from toolchain.accuracy.eager import EagerPipeline
from toolchain.errors import AccuracyError, RecipeError
from toolchain.formats import manifest as m
from toolchain.formats.bundle import Bundle, describe_file
from toolchain.formats.tensors import read_tensors
from toolchain.listener import Listener
from toolchain.planning.plan import Plan
from toolchain.player import Player
from toolchain.player.video import to_bytes

FILE = "goldens/video.safetensors"
SAME_DB = 200.0
"""What stands for no difference."""


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels ``uint8``, at most :data:`SAME_DB`."""
    error = float((video.double() - reference.double()).square().mean())
    return min(SAME_DB, 10.0 * math.log10(255.0**2 / error)) if error else SAME_DB


def make(manifest: m.Manifest, planned: Plan, folder: Path, listener: Listener) -> m.GoldenVideo:
    """Make the eager video that ``gate.golden`` asks for, play the bundle in ``folder`` against it, and store it.

    Raises:
        AccuracyError: the bundle's video is too far from it.
        RecipeError: the recipe lacks a component that a video needs.
    """
    recipe, asked = planned.recipe, planned.recipe.gate.golden
    if asked is None:
        raise ValueError("the recipe asks for no golden video")
    if recipe.text_encoder is None or recipe.vae is None:
        raise RecipeError("gate.golden: a video needs a text_encoder and a vae; add them, or remove gate.golden")
    listener.remark(f"golden video: '{asked.prompt}', eager and from the bundle")
    expected = to_bytes(EagerPipeline.of(planned.resolved).video(asked.prompt, asked.seed))
    path = folder / FILE
    path.parent.mkdir(exist_ok=True)
    save_file({"pixels": expected}, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    golden = m.GoldenVideo(
        file=describe_file(path, folder),
        prompt=asked.prompt,
        seed=asked.seed,
        psnr_db=0.0,
        limit_db=asked.min_psnr_db,
    )
    found = compare(Bundle(folder, manifest), golden, folder)
    require(golden, found)
    return golden.model_copy(update={"psnr_db": float(f"{found:.4g}")})


def compare(bundle: Bundle, golden: m.GoldenVideo, root: Path) -> float:
    """Play the bundle; PSNR in dB of its video against the golden one, whose file lies in the bundle ``root``."""
    video = to_bytes(Player(bundle, warn=lambda _: None).video(golden.prompt, golden.seed))
    return psnr(video, read_tensors(root / golden.file.path)["pixels"])


def require(golden: m.GoldenVideo, psnr_db: float) -> None:
    """Refuse a video that is too far from the golden one.

    Raises:
        AccuracyError: gives both figures.
    """
    if not psnr_db >= golden.limit_db:
        raise AccuracyError(
            f"golden video '{golden.prompt}', seed {golden.seed}: {psnr_db:.1f} dB against the eager pipeline's, "
            f"less than {golden.limit_db:.1f}; verify the blocks, or lower gate.golden.min_psnr_db"
        )
