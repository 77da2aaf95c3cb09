"""Checkpoints whose autoencoder is not the published one: latents are sized by what the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CONFIGS

import toolchain
from toolchain.accuracy.eager import EagerPipeline
from toolchain.errors import RecipeError
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.player import Player

PROMPT = "a small red circle"


def with_vae(recipe_data: dict[str, Any], frames: int, **changes: Any) -> Recipe:
    vae = {"checkpoint": "vae", "config": CONFIGS["vae"] | changes}
    video = recipe_data["video"] | {"frames": frames}
    return parse_recipe({**recipe_data, "video": video, "vae": vae, "gate": {"mode": "none"}, "target": "onnx"})


@pytest.mark.slow
@pytest.mark.parametrize(("micro_frame_size", "chunks"), [(9, [(3, 9), (3, 9), (1, 4)])])
def test_another_micro_frame_size_is_computed_as_the_model_does(
    recipe_data: dict[str, Any],
    build: Callable[[Recipe], Bundle],
    eager: Callable[[Recipe], EagerPipeline],
    psnr: Callable[[torch.Tensor, torch.Tensor], float],
    micro_frame_size: int,
    chunks: list[tuple[int, int]],
) -> None:
    recipe = with_vae(recipe_data, 22, micro_frame_size=micro_frame_size)
    bundle = build(recipe)
    assert bundle.manifest.geometry.latent_frames == sum(latents for latents, _ in chunks)
    assert bundle.manifest.decoding is not None
    assert [(p.takes, p.gives) for p in bundle.manifest.decoding.stages[0].pieces] == chunks
    played = Player(bundle, warn=lambda _: None).video(PROMPT, 5)
    assert played.shape[0] == 22
    assert psnr(played, eager(recipe).video(PROMPT, 5)) > 60


def test_latents_of_another_width_are_refused(recipe_data: dict[str, Any]) -> None:
    changes = {"temporal": CONFIGS["vae"]["temporal"] | {"embed_dim": 6}, "shift": [0.0] * 6, "scale": [1.0] * 6}
    transformer = {"checkpoint": "nowhere", "config": CONFIGS["transformer"], "passes": "token-merge"}
    recipe = with_vae({**recipe_data, "text_encoder": None, "transformer": transformer}, 22, **changes)
    with pytest.raises(RecipeError) as error:
        toolchain.plan(recipe)
    assert str(error.value) == ("vae.config: its latents have 6 channels, the transformer takes 4 (in_channels)")
