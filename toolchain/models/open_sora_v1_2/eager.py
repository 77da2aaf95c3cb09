"""T5 and the autoencoder in PyTorch, as published: for models that fit in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.formats.tiles import Tiles
from toolchain.models.family import Configs
from toolchain.models.open_sora_v1_2.t5 import T5Config, T5Encoder
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig


class EagerOpenSora:
    """Open-Sora 1.2's :class:`toolchain.models.family.EagerModels`; ``frames`` and ``tiles`` are the video's."""

    def __init__(
        self,
        configs: Configs,
        weights: Mapping[str, Mapping[str, torch.Tensor]],
        frames: int,
        tiles: Tiles | None = None,
    ) -> None:
        self._encoder = T5Encoder(T5Config.from_json(configs["text_encoder"]))
        self._encoder.load_state_dict(dict(weights["text_encoder"]))
        self._vae = OpenSoraVAE(OpenSoraVAEConfig.from_json(configs["vae"]))
        self._vae.load_state_dict(dict(weights["vae"]))
        self._frames, self._tiles = frames, tiles

    @torch.no_grad()
    def encode(self, token_ids: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self._encoder(token_ids, token_mask)
        return embedding

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._vae.decode(latents, self._frames, self._tiles)[0].transpose(0, 1)
