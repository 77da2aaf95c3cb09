"""The toy family: how a recipe becomes its components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.toy_family import model as toy
from toolchain.errors import RecipeError
from toolchain.formats.manifest import Geometry, Piece, Stage, Suffix
from toolchain.formats.recipe import Recipe
from toolchain.models.family import Configs, Definition, EagerModels, Forms, ModelFamily, PromptPreparation

TOGETHER = 3
"""Frames that the decoder takes at once; a last group may be shorter."""


class ToyFamily(ModelFamily):
    name = "toy"

    def check(self, recipe: Recipe) -> None:
        if recipe.video.height % toy.RATIO or recipe.video.width % toy.RATIO:
            raise RecipeError(f"video: height and width must be multiples of {toy.RATIO}")

    def geometry(self, recipe: Recipe, configs: Configs) -> Geometry:
        v = recipe.video
        return Geometry(
            frames=v.frames,
            height=v.height,
            width=v.width,
            fps=v.fps,
            latent_channels=int(configs["transformer"]["channels"]),
            latent_frames=v.frames,
            latent_height=v.height // toy.RATIO,
            latent_width=v.width // toy.RATIO,
        )

    def define(self, recipe: Recipe, configs: Configs) -> dict[str, Definition]:
        g, c = self.geometry(recipe, configs), configs["transformer"]
        latent = (g.latent_channels, g.latent_frames, g.latent_height, g.latent_width)
        with torch.device("meta"):
            denoiser = toy.ToyDenoiser(c["channels"], c["width"], c["text"], c["words"], c["layers"])
            words = toy.Words(configs["text_encoder"]["vocabulary"], c["text"])
            paint = toy.Paint(g.latent_channels)
        forms = {
            "text_encoder": toy.LoweredReader(words, c["words"]),
            "transformer": toy.LoweredDenoiser(denoiser, latent, c["words"], c["text"]),
            "vae": toy.LoweredPainter(paint, TOGETHER, latent),
        }
        expected = checkpoint_shapes(configs)
        return {n: Definition(n, configs[n], expected[n], (Forms(form),)) for n, form in forms.items()}

    def timesteps(self, recipe: Recipe) -> tuple[float, ...]:
        return tuple(1000.0 * (1 - i / recipe.sampler.steps) for i in range(recipe.sampler.steps))

    def prompt(self, recipe: Recipe, configs: Configs) -> PromptPreparation:
        suffix = Suffix(label="in the style of", text=" in the style of a toy")
        return PromptPreparation(int(configs["transformer"]["words"]), (suffix,), "none")

    def stages(self, recipe: Recipe, configs: Configs) -> tuple[Stage, ...]:
        frames = recipe.video.frames
        groups = [min(TOGETHER, frames - at) for at in range(0, frames, TOGETHER)]
        pieces = [Piece(takes=TOGETHER, gives=n, function="base") for n in groups]
        return (Stage(rate="frames", layout="frames", pieces=pieces),)

    def eager(self, recipe: Recipe, configs: Configs, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> EagerModels:
        return EagerToy(weights)


class EagerToy:
    """Text encoder and decoder straight from the checkpoint's tensors."""

    def __init__(self, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._table, self._packed = weights["text_encoder"]["words.table"], weights["vae"]["paint.packed"]

    def encode(self, token_ids: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self._table[token_ids])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        flat = torch.einsum("pc,cthw->tphw", self._packed[:, :-1], latents[0]) + self._packed[:, -1, None, None]
        return torch.nn.functional.pixel_shuffle(torch.tanh(flat), toy.RATIO)


def checkpoint_shapes(configs: Configs) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a checkpoint, by component."""
    c: Mapping[str, Any] = configs["transformer"]
    width, text, channels = c["width"], c["text"], c["channels"]
    transformer: dict[str, tuple[int, ...]] = {
        "lift.lift.weight": (width, channels),
        "lift.lift.bias": (width,),
        "mood.words.weight": (width, text),
        "mood.words.bias": (width,),
        "mood.level.weight": (width, 1),
        "mood.level.bias": (width,),
        "drop.drop.weight": (channels, width),
        "drop.drop.bias": (channels,),
        "silence": (c["words"], text),
    }
    for i in range(c["layers"]):
        for part in toy.SPLIT:
            transformer |= {f"layers.{i}.attend.{part}.weight": (width, width)}
            transformer |= {f"layers.{i}.attend.{part}.bias": (width,)}
    return {
        "text_encoder": {"words.table": (configs["text_encoder"]["vocabulary"], text)},
        "transformer": transformer,
        "vae": {"paint.packed": (3 * toy.RATIO**2, channels + 1)},
    }
