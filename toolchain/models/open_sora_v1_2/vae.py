"""Open-Sora's video autoencoder (OpenSora-VAE-v1.2), written to be traced and lowered.

A spatial autoencoder works frame by frame, a temporal one on micro chunks of 17 frames that do not see
one another. ``OpenSoraVAE`` takes the official state_dict; ``vae_lowered`` has its parts for one geometry.

Names of values: pixels, the spatial latent times ``spatial_scaling`` (``x_z``), the temporal latent,
and that normalised (``z``), which is what the transformer knows.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.formats.tiles import Tiles, in_tiles
from toolchain.models.open_sora_v1_2.vae_config import OpenSoraVAEConfig
from toolchain.models.open_sora_v1_2.vae_leaves import Denormalize
from toolchain.models.open_sora_v1_2.vae_spatial import SpatialVAE
from toolchain.models.open_sora_v1_2.vae_temporal import TemporalVAE

__all__ = ["OpenSoraVAE", "OpenSoraVAEConfig"]


class OpenSoraVAE(nn.Module):
    """Videos to latents and back, any number of frames."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, config: OpenSoraVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = SpatialVAE(config.spatial, config.spatial_scaling)
        self.temporal_vae = TemporalVAE(config.temporal)
        self.denormalize = Denormalize()
        self.register_buffer("scale", torch.tensor(config.scale).reshape(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(config.shift).reshape(1, -1, 1, 1, 1))

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video of ``frames`` frames of ``height`` by ``width`` pixels."""
        factor = self.config.spatial.factor
        return self.config.latent_frames(frames), height // factor, width // factor

    def spatial_moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels ``[B, 3, T, H, W]`` to mean and log variance of each frame's latent ``[B·T, C, h, w]``."""
        frames = as_frames(x)
        parts = [self.spatial_vae.module.moments(f) for f in torch.split(frames, self.config.micro_batch_size)]
        mean, logvar = (torch.cat(m) for m in zip(*parts, strict=True))
        return mean, logvar

    def temporal_moments(self, x_z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x_z`` ``[B, C, T, h, w]`` to mean and log variance of the latent ``[B, C, t, h, w]``."""
        chunks = torch.split(x_z, self.config.micro_frame_size, dim=2)
        parts = [self.temporal_vae.moments(c, c.shape[2]) for c in chunks]
        mean, logvar = (torch.cat(m, dim=2) for m in zip(*parts, strict=True))
        return mean, logvar

    def encode(
        self, x: torch.Tensor, *, spatial_noise: torch.Tensor | None = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pixels to the latents that the transformer knows.

        Args:
            x: ``[B, 3, T, H, W]``, -1 … 1.
            spatial_noise: ``[B·T, C, h, w]`` standard normal, for the spatial latent; None takes its mean.
            noise: ``[B, C, t, h, w]`` standard normal, for the temporal latent; None takes its mean.

        Returns:
            ``z`` ``[B, C, t, h, w]``; t, h, w as in :meth:`latent_size`.
        """
        latent = sample(*self.spatial_moments(x), spatial_noise)
        x_z = as_video(latent, x.shape[0]) * self.config.spatial_scaling
        return self.encode_temporal(x_z, noise=noise)

    def encode_temporal(self, x_z: torch.Tensor, *, noise: torch.Tensor | None = None) -> torch.Tensor:
        """``x_z`` ``[B, C, T, h, w]`` to ``z`` ``[B, C, t, h, w]``, with noise as in :meth:`encode`."""
        return (sample(*self.temporal_moments(x_z), noise) - self.shift) / self.scale

    def decode_temporal(self, z: torch.Tensor, num_frames: int) -> torch.Tensor:
        """``z`` ``[B, C, t, h, w]`` to ``x_z`` ``[B, C, num_frames, h, w]``.

        Raises:
            ValueError: a video of ``num_frames`` has another number of latent frames.
        """
        chunks = self.config.chunks(num_frames)
        latents = [n for n, _ in chunks]
        if sum(latents) != z.shape[2]:
            raise ValueError(f"{num_frames} frames have {sum(latents)} latent frames, not {z.shape[2]}")
        parts = torch.split(z, latents, dim=2)
        out = [self.decode_chunk(part, frames) for part, (_, frames) in zip(parts, chunks, strict=True)]
        return torch.cat(out, dim=2)

    def decode_chunk(self, z: torch.Tensor, frames: int) -> torch.Tensor:
        """One micro chunk: ``z`` ``[B, C, t, h, w]`` to ``x_z`` ``[B, C, frames, h, w]``."""
        return self.temporal_vae.decode(self.denormalize(z, self.scale, self.shift), frames)

    def decode(self, z: torch.Tensor, num_frames: int, tiles: Tiles | None = None) -> torch.Tensor:
        """``z`` ``[B, C, t, h, w]`` to pixels ``[B, 3, num_frames, H, W]``, about -1 … 1.

        With ``tiles`` the spatial autoencoder sees one at a time: memory becomes less, numbers change.

        Raises:
            ValueError: a video of ``num_frames`` has another number of latent frames.
        """
        x_z = as_frames(self.decode_temporal(z, num_frames))
        parts = torch.split(x_z, self.config.micro_batch_size)
        pixels = [in_tiles(tiles, part, self.spatial_vae.decode) for part in parts]
        return as_video(torch.cat(pixels), z.shape[0])


def as_frames(video: torch.Tensor) -> torch.Tensor:
    """``[B, C, T, H, W]`` to ``[B·T, C, H, W]``."""
    return video.transpose(1, 2).flatten(0, 1)


def as_video(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """``[B·T, C, H, W]`` to ``[B, C, T, H, W]``."""
    return frames.reshape(batch, -1, *frames.shape[1:]).transpose(1, 2)


def sample(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """A normal distribution's value for standard normal ``noise``; its mean for None."""
    return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
