"""The components of a model family: how each is configured, built without weights, and fed.

A component's model lives in ``toolchain.models``; this is the only place that chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.ir.graph import Input, LoweredForm

MEANINGS = {
    "x": "noisy latents",
    "timestep": "denoising timestep, 1000 to 0",
    "y": "text encoder output; tables.null_text for the unconditional half",
    "mask": "1 for the prompt's tokens, 0 for padding; the conditional half's mask for both halves",
    "fps": "frames per second: sampler.model_fps",
    "x_mask": "per latent frame, 0 where it is given as condition, else 1",
    "input_ids": "token ids of the prompt, padded",
    "z": "a micro chunk of latents",
    "x_z": "frames of the spatial VAE's latents",
    "pixels": "frames, red green blue, -1 to 1",
}
SPATIAL_FRAMES = 4


@dataclass(frozen=True)
class Forms:
    """What is captured as one graph: ``base``, and the same modules at other sizes as other functions."""

    base: LoweredForm
    others: Mapping[str, LoweredForm] = field(default_factory=dict)


@dataclass(frozen=True)
class Definition:
    """A component, ready to be captured: nothing of it is allocated."""

    name: str
    config: dict[str, Any]
    expected: Mapping[str, tuple[int, ...]]
    """Official names and shapes of the checkpoint's tensors."""
    forms: tuple[Forms, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a checkpoint may hold under another name, or under both."""


def define(component: str, recipe: Recipe, config: Mapping[str, Any], text_tokens: int = 0) -> Definition:
    """A component of the recipe, for the recipe's video and, the text encoder, prompts of ``text_tokens`` tokens.

    Raises:
        RecipeError: the configuration or the video's size is not one the model can have.
    """
    try:
        if component == "text_encoder":
            return _text_encoder(config, text_tokens)
        return _transformer(recipe, config) if component == "transformer" else _vae(recipe, config)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as e:
        raise RecipeError(f"{component}.config: {e}") from e


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def _text_encoder(config: Mapping[str, Any], tokens: int) -> Definition:
    from toolchain.models.open_sora_v1_2.t5 import TIED, LoweredT5, T5Config, T5Encoder

    parsed = T5Config.from_json(config)
    with torch.device("meta"):
        model = T5Encoder(parsed)
    expected = {k: v for k, v in _shapes(model).items() if k not in TIED.values()}
    forms = (Forms(LoweredT5(model, prompts=1, length=tokens)),)
    whole = asdict(parsed) | {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    return Definition("text_encoder", whole, expected, forms, aliases=TIED)


def _transformer(recipe: Recipe, config: Mapping[str, Any]) -> Definition:
    from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config

    parsed = STDiT3Config.from_json(config)
    with torch.device("meta"):
        model = STDiT3(parsed)
    height, width = recipe.video.latent_size
    form = LoweredSTDiT3(
        model,
        batch=2,
        frames=recipe.video.latent_frames,
        height=height,
        width=width,
        height_px=recipe.video.height,
        width_px=recipe.video.width,
        frame_conditions=recipe.transformer.frame_conditions,
    )
    return Definition("transformer", asdict(parsed), _shapes(model), (Forms(form),))


def _vae(recipe: Recipe, config: Mapping[str, Any]) -> Definition:
    from toolchain.models.open_sora_v1_2 import vae_lowered as lowered
    from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig

    parsed = OpenSoraVAEConfig.from_json(config)
    with torch.device("meta"):
        model = OpenSoraVAE(parsed)
    height, width = recipe.video.latent_size
    chunks = chunk_functions(parsed.chunks(recipe.video.frames))
    temporal = {
        name: lowered.LoweredTemporalDecoder(model, latents=latents, frames=frames, height=height, width=width)
        for name, (latents, frames) in chunks.items()
    }
    spatial = lowered.LoweredSpatialDecoder(model, frames=frames_per_call(recipe), height=height, width=width)
    forms = [Forms(temporal.pop("base"), temporal), Forms(spatial)]
    if recipe.vae is not None and recipe.vae.encoder:
        px = {"height_px": recipe.video.height, "width_px": recipe.video.width}
        encoders = {
            name: lowered.LoweredTemporalEncoder(model, frames=frames, height=height, width=width)
            for name, (_, frames) in chunks.items()
        }
        forms += [
            Forms(lowered.LoweredSpatialEncoder(model, frames=frames_per_call(recipe), **px)),
            Forms(encoders.pop("base"), encoders),
        ]
    return Definition("vae", asdict(parsed), _shapes(model), tuple(forms))


def chunk_functions(chunks: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The temporal VAE's functions: ``base`` for all chunks, and ``tail`` if the last one is shorter.

    ``chunks`` and the values are latents and frames of a chunk.
    """
    return {"base": chunks[0]} | ({"tail": chunks[-1]} if chunks[-1] != chunks[0] else {})


def frames_per_call(recipe: Recipe) -> int:
    """Frames that the spatial VAE takes at once: as asked for, or the largest divisor up to 4."""
    if recipe.vae is not None and recipe.vae.frames_per_call is not None:
        return recipe.vae.frames_per_call
    return max(n for n in range(1, SPATIAL_FRAMES + 1) if recipe.video.frames % n == 0)


def sample_input(spec: Input, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """An input as a real run has it: unit variance, a padded prompt, a timestep whatever the sampler's settings."""
    match spec.name:
        case "timestep":
            return torch.full(spec.shape, 1000.0 * float(torch.rand((), generator=generator)))
        case "fps":
            return torch.full(spec.shape, recipe.model_fps)
        case "mask":
            length = int(torch.randint(1, spec.shape[1] + 1, (), generator=generator))
            return (torch.arange(spec.shape[1]) < length).float().expand(spec.shape).contiguous()
        case "x_mask":
            return (torch.rand(spec.shape, generator=generator) < 0.5).float()
        case "input_ids":
            return torch.randint(0, 32, spec.shape, generator=generator, dtype=spec.dtype)
        case "pixels":
            return torch.rand(spec.shape, generator=generator) * 2 - 1
        case _:
            return torch.randn(spec.shape, generator=generator)
