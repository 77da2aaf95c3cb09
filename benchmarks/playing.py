"""What benchmarks of playing share: a bundle of a mid-size model, and loads that really read from storage.

The transformer has its full width and few pairs; text encoder and VAE are next to nothing. Weights are random, so the
video is noise, which costs as much as any other.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import synthetic
import torch

import toolchain
from toolchain.build import entries
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.ir.target import Engine
from toolchain.models.family import find_family
from toolchain.planning.sampling import sampling
from toolchain.player import Player

TOKENIZER = Path(__file__).parent.parent / "recipes/tiny/text_encoder/spiece.model"
CAPTIONS = 256
WIDTHS: dict[str, dict[str, int]] = {
    "full": {"hidden_size": 1152, "num_heads": 16},
    "small": {"hidden_size": 288, "num_heads": 4},
}
TEXT_ENCODER = {"vocab_size": 256, "d_model": CAPTIONS, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
VAE = {
    "spatial": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 0, "norm_num_groups": 4},
    "temporal": {
        "filters": 8,
        "num_res_blocks": 1,
        "channel_multipliers": [1, 1, 2],
        "temporal_downsample": [True, True],
        "num_groups": 4,
    },
}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that say how large the model and its video are."""
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--width", default="full", choices=list(WIDTHS))


def build(folder: Path, width: str, pairs: int, side: int, steps: int) -> tuple[Bundle, Recipe]:
    """Compile the model for ExecuTorch into ``folder``, for ``steps`` steps of a clip of ``side`` × ``side`` pixels."""
    transformer = WIDTHS[width] | {"depth": pairs, "caption_channels": CAPTIONS, "model_max_length": 64}
    configs: dict[str, dict[str, Any]] = {"text_encoder": TEXT_ENCODER, "transformer": transformer, "vae": VAE}
    for seed, (component, config) in enumerate(configs.items()):
        synthetic.write(component, folder / component, config, torch.float32, seed)
    shutil.copy(TOKENIZER, folder / "text_encoder")
    data: dict[str, Any] = {
        "name": f"mid-size, {pairs} pairs, {width} width",
        "model": "open-sora-v1.2",
        "video": {"frames": 17, "height": side, "width": side, "fps": 8},
        "sampler": {"steps": steps, "merged_steps": steps // 2},
        "text_encoder": {"checkpoint": "text_encoder"},
        "transformer": {"checkpoint": "transformer", "passes": ["token-merge", "partition"]},
        "vae": {"checkpoint": "vae"},
        "target": "executorch",
        "gate": {"mode": "none"},
    }
    recipe = parse_recipe(data)
    built = toolchain.compile_recipe(recipe, folder / "bundle", base=folder)
    os.sync()  # what is not on disk yet cannot be dropped from memory
    return toolchain.load_bundle(built.path), recipe


def with_sampler(bundle: Bundle, recipe: Recipe, **sampler: Any) -> Bundle:
    """The bundle's artifacts with another sampler; its loading plan is then that of the old one."""
    other = recipe.model_copy(update={"sampler": SamplerRecipe.model_validate(sampler)})
    entry = entries.sampler(other, sampling(other, find_family(recipe.model)))
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"sampler": entry}))


def drop(files: Iterable[Path]) -> None:
    """Have the system forget what it keeps of files in memory, so that reading them reads from storage."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class ColdPlayer(Player):
    """A player whose every load reads from storage."""

    def open_block(self, block: str, function: str) -> Engine:
        drop(self.bundle.path / file.path for file in self._blocks[block].files)
        return super().open_block(block, function)
