"""Open-Sora 1.2's components, built without weights for one geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from toolchain.formats.manifest import Geometry
from toolchain.formats.tiles import Tiles
from toolchain.models.family import Definition, Forms
from toolchain.models.open_sora_v1_2 import vae_lowered as lowered
from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config
from toolchain.models.open_sora_v1_2.t5 import TIED, LoweredT5, T5Config, T5Encoder
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig
from toolchain.models.open_sora_v1_2.vae_config import chunk_functions


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def text_encoder(config: Mapping[str, Any], tokens: int) -> Definition:
    """T5, for one prompt of ``tokens`` tokens."""
    parsed = T5Config.from_json(config)
    with torch.device("meta"):
        model = T5Encoder(parsed)
    expected = {k: v for k, v in _shapes(model).items() if k not in TIED.values()}
    forms = (Forms(LoweredT5(model, prompts=1, length=tokens)),)
    whole = asdict(parsed) | {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    return Definition("text_encoder", whole, expected, forms, aliases=TIED)


def transformer(config: Mapping[str, Any], geometry: Geometry, *, fps: float, frame_conditions: bool) -> Definition:
    """STDiT3, for both halves of guidance together."""
    parsed = STDiT3Config.from_json(config)
    with torch.device("meta"):
        model = STDiT3(parsed)
    form = LoweredSTDiT3(
        model,
        batch=2,
        frames=geometry.latent_frames,
        height=geometry.latent_height,
        width=geometry.latent_width,
        height_px=geometry.height,
        width_px=geometry.width,
        fps=fps,
        frame_conditions=frame_conditions,
    )
    return Definition("transformer", asdict(parsed), _shapes(model), (Forms(form),))


def vae(
    config: OpenSoraVAEConfig, geometry: Geometry, frames_per_call: int, tiles: Tiles | None, encoder: bool
) -> Definition:
    """The decoder's parts, and the encoder's if wanted; the last, shorter chunk is the function ``tail``.

    ``tiles`` are the spatial decoder's; all other parts take whole frames.
    """
    with torch.device("meta"):
        model = OpenSoraVAE(config)
    height, width = geometry.latent_height, geometry.latent_width
    chunks = chunk_functions(config.chunks(geometry.frames))
    temporal = {
        name: lowered.LoweredTemporalDecoder(model, latents=latents, frames=frames, height=height, width=width)
        for name, (latents, frames) in chunks.items()
    }
    rows, columns = (height, width) if tiles is None else (tiles.height, tiles.width)
    spatial = lowered.LoweredSpatialDecoder(model, frames=frames_per_call, height=rows, width=columns)
    forms = [Forms(temporal.pop("base"), temporal), Forms(spatial)]
    if encoder:
        px = {"height_px": geometry.height, "width_px": geometry.width}
        encoders = {
            name: lowered.LoweredTemporalEncoder(model, frames=frames, height=height, width=width)
            for name, (_, frames) in chunks.items()
        }
        forms += [
            Forms(lowered.LoweredSpatialEncoder(model, frames=frames_per_call, **px)),
            Forms(encoders.pop("base"), encoders),
        ]
    return Definition("vae", asdict(config), _shapes(model), tuple(forms))
