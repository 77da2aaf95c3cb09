"""Open-Sora 1.2: T5 v1.1, STDiT3 and Open-Sora's video autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from toolchain.errors import RecipeError
from toolchain.formats.manifest import Geometry, Piece, Stage
from toolchain.formats.tiles import Tiles, tiles_of
from toolchain.models.family import Configs, Definition, EagerModels, ModelFamily, PromptPreparation
from toolchain.models.open_sora_v1_2.prompts import suffixes
from toolchain.models.open_sora_v1_2.timesteps import timesteps, transform_ratio
from toolchain.models.open_sora_v1_2.vae_config import OpenSoraVAEConfig, chunk_functions

if TYPE_CHECKING:
    import torch

    from toolchain.formats.recipe import Recipe

IMAGE_FPS = 120
"""What the model is told for a single frame, as in its training."""
SPATIAL_FRAMES = 4
"""Frames that the spatial autoencoder takes at once, at most, unless a recipe says otherwise."""
PUBLISHED_LATENT_CHANNELS, PUBLISHED_TOKENS = 4, 300


class OpenSoraV12(ModelFamily):
    """The family ``open-sora-v1.2``."""

    name = "open-sora-v1.2"

    def check(self, recipe: Recipe) -> None:
        try:
            self.timesteps(recipe)
        except RecipeError as e:
            raise RecipeError(f"video: {e}") from e

    def timesteps(self, recipe: Recipe) -> tuple[float, ...]:
        video, sampler = recipe.video, recipe.sampler
        return timesteps(
            sampler.steps,
            height=video.height,
            width=video.width,
            frames=video.frames,
            discrete=sampler.discrete_timesteps,
            scale=sampler.transform_scale,
        )

    def transform_ratio(self, recipe: Recipe) -> float:
        """The ratio by which a recipe's timesteps are transformed, its ``transform_scale`` included."""
        v = recipe.video
        return transform_ratio(v.height, v.width, v.frames, scale=recipe.sampler.transform_scale)

    def geometry(self, recipe: Recipe, configs: Configs) -> Geometry:
        video, vae = recipe.video, _vae_config(configs)
        with _named("transformer"):
            channels = int(configs["transformer"].get("in_channels", PUBLISHED_LATENT_CHANNELS))
        if channels != vae.temporal.embed_dim:
            raise RecipeError(
                f"vae.config: its latents have {vae.temporal.embed_dim} channels, "
                f"the transformer takes {channels} (in_channels)"
            )
        return Geometry(
            frames=video.frames,
            height=video.height,
            width=video.width,
            fps=video.fps,
            latent_channels=channels,
            latent_frames=vae.latent_frames(video.frames),
            latent_height=video.height // vae.spatial.factor,
            latent_width=video.width // vae.spatial.factor,
        )

    def define(self, recipe: Recipe, configs: Configs) -> dict[str, Definition]:
        from toolchain.models.open_sora_v1_2 import components

        geometry, parts = self.geometry(recipe, configs), {}
        if "text_encoder" in configs:
            with _named("text_encoder"):
                parts["text_encoder"] = components.text_encoder(configs["text_encoder"], self._tokens(configs))
        with _named("transformer"):
            parts["transformer"] = components.transformer(
                configs["transformer"],
                geometry,
                fps=float(IMAGE_FPS if recipe.video.frames == 1 else recipe.video.fps),
                frame_conditions=recipe.transformer.frame_conditions,
            )
        if "vae" in configs:
            with _named("vae"):
                encoder = recipe.vae is not None and recipe.vae.encoder
                own, tiles = _vae_config(configs), self._tiles(recipe, configs)
                parts["vae"] = components.vae(own, geometry, _frames_per_call(recipe), tiles, encoder)
        if "text_encoder" in parts:
            given = parts["text_encoder"].config["d_model"]
            taken = parts["transformer"].config["caption_channels"]
            if given != taken:
                raise RecipeError(
                    f"text_encoder: its outputs have {given} channels, the transformer takes {taken} (caption_channels)"
                )
        return parts

    def prompt(self, recipe: Recipe, configs: Configs) -> PromptPreparation:
        score = recipe.text_encoder.aesthetic_score if recipe.text_encoder is not None else None
        return PromptPreparation(self._tokens(configs), suffixes(score=score), "web-captions")

    def stages(self, recipe: Recipe, configs: Configs) -> tuple[Stage, ...]:
        chunks = _vae_config(configs).chunks(recipe.video.frames)
        function = {chunk: name for name, chunk in chunk_functions(chunks).items()}
        together, frames = _frames_per_call(recipe), recipe.video.frames
        groups = [min(together, frames - start) for start in range(0, frames, together)]
        return (
            Stage(
                rate="chunk",
                layout="clip",
                pieces=[Piece(takes=taken, gives=given, function=function[taken, given]) for taken, given in chunks],
            ),
            Stage(
                rate="frames",
                layout="frames",
                pieces=[Piece(takes=together, gives=given, function="base") for given in groups],
                tiles=self._tiles(recipe, configs),
            ),
        )

    def eager(self, recipe: Recipe, configs: Configs, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> EagerModels:
        from toolchain.models.open_sora_v1_2.eager import EagerOpenSora

        return EagerOpenSora(configs, weights, recipe.video.frames, self._tiles(recipe, configs))

    def default_partition(self, component: str) -> str:
        return "partition{max_bytes=200MB}" if component == "vae" else "partition"

    def _tiles(self, recipe: Recipe, configs: Configs) -> Tiles | None:
        """Tiles that the spatial decoder takes."""
        asked = recipe.vae.tiles if recipe.vae is not None else None
        if asked is None:
            return None
        geometry = self.geometry(recipe, configs)
        return tiles_of(
            (geometry.latent_height, geometry.latent_width),
            height_px=asked.height,
            width_px=asked.width,
            overlap_px=asked.overlap,
            factor=_vae_config(configs).spatial.factor,
        )

    def _tokens(self, configs: Configs) -> int:
        """Tokens of a prompt, padding included."""
        return int(configs["transformer"].get("model_max_length", PUBLISHED_TOKENS))


def _vae_config(configs: Configs) -> OpenSoraVAEConfig:
    """The VAE's sizes; the published ones where a recipe has no VAE."""
    with _named("vae"):
        return OpenSoraVAEConfig.from_json(configs.get("vae", {}))


def _frames_per_call(recipe: Recipe) -> int:
    """Frames that the spatial VAE takes at once: as asked for, or the largest divisor up to 4."""
    if recipe.vae is not None and recipe.vae.frames_per_call is not None:
        return recipe.vae.frames_per_call
    return max(n for n in range(1, SPATIAL_FRAMES + 1) if recipe.video.frames % n == 0)


@contextmanager
def _named(component: str) -> Iterator[None]:
    """Turn what a configuration's parser says into an error that names the recipe's key.

    Raises:
        RecipeError: the body found a value that the model cannot have.
    """
    try:
        yield
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as e:
        raise RecipeError(f"{component}.config: {e}") from e
