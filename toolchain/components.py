"""The components of a model family: how each is configured, built without weights, and fed.

A component's model lives in ``toolchain.models``; this is the only place that chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from toolchain.errors import RecipeError
from toolchain.graph import LoweredForm
from toolchain.recipe import Recipe

MEANINGS = {
    "x": "noisy latents",
    "timestep": "denoising timestep, 1000 to 0",
    "y": "text encoder output; tables.null_text for the unconditional half",
    "mask": "1 for the prompt's tokens, 0 for padding; the conditional half's mask for both halves",
    "fps": "frames per second; 120 for a single frame",
    "x_mask": "per latent frame, 0 where it is given as condition, else 1",
}


@dataclass(frozen=True)
class Definition:
    """A component, ready to be captured: nothing of it is allocated."""

    name: str
    config: dict[str, Any]
    expected: Mapping[str, tuple[int, ...]]
    """Official names and shapes of the checkpoint's tensors."""
    form: LoweredForm


def define_transformer(recipe: Recipe, config: Mapping[str, Any]) -> Definition:
    """STDiT3 for the recipe's video.

    Raises:
        RecipeError: the configuration or the video's size is not one the model can have.
    """
    from dataclasses import asdict

    from toolchain.models.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config

    try:
        parsed = STDiT3Config.from_json(config)
        with torch.device("meta"):
            model = STDiT3(parsed)
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise RecipeError(f"transformer.config: {e}") from e
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
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return Definition("transformer", asdict(parsed), expected, form)


def sample_inputs(form: LoweredForm, recipe: Recipe, seed: int) -> dict[str, torch.Tensor]:
    """Inputs as a real run has them: latents of unit variance, a padded prompt, a timestep of the schedule."""
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.timesteps()
    values: dict[str, torch.Tensor] = {}
    for spec in form.inputs():
        match spec.name:
            case "timestep":
                choice = steps[int(torch.randint(len(steps), (), generator=generator))]
                values[spec.name] = torch.full(spec.shape, choice)
            case "fps":
                values[spec.name] = torch.full(spec.shape, float(recipe.video.fps))
            case "mask":
                length = int(torch.randint(1, spec.shape[1] + 1, (), generator=generator))
                values[spec.name] = (torch.arange(spec.shape[1]) < length).float().expand(spec.shape).contiguous()
            case "x_mask":
                values[spec.name] = (torch.rand(spec.shape, generator=generator) < 0.5).float()
            case _:
                values[spec.name] = torch.randn(spec.shape, generator=generator)
    return values
