"""The stages that train the video autoencoder: first its spatial half, then its temporal one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, as_frames, as_video
from training.grammar import FRAMES, Look, Scene, centres, draw, render, split
from training.loop import Plan, generators, train
from training.sizes import VAE

DECODERS = Plan("vae-decoders", steps=600, lr=7e-4, warmup=30, decay_from=0.3)
SPATIAL = Plan("vae-spatial", steps=1500, lr=2e-3)
TEMPORAL = Plan("vae-temporal", steps=2000, lr=2e-3)
FRAMES_A_BATCH = 16
CLIPS_A_BATCH = 12
CLIPS_TO_DECODE, FRAMES_TO_DECODE = 4, 5
"""Videos a batch when both decoders train together, and how many frames of each are decoded to pixels."""
UNSURE = 0.05
"""Deviation of the noise on latents that the decoders learn to bear: a transformer's are not quite right."""
POOL = 936
"""Clips whose spatial latents the temporal half trains on: six of every scene."""


def pictures(rng: random.Random, count: int) -> torch.Tensor:
    """Single frames of random training videos ``[count, 3, 64, 64]``."""
    what = [rng.choice(split()[0]).varied(rng) for _ in range(count)]
    looks = [Look.draw(rng, scene) for scene in what]
    times = [rng.randrange(FRAMES) for _ in what]
    places = torch.stack([centres(s, look)[t] for s, look, t in zip(what, looks, times, strict=True)])
    return draw(what, torch.tensor([look.radius for look in looks]), places)


def edges(x: torch.Tensor) -> torch.Tensor:
    """Weight of each pixel ``[n, 1, H, W]``: more near the shape's outline."""
    near = F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)
    return 1.0 + 3.0 * (near.amax(dim=1, keepdim=True) > 0.2)


def kl(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Mean divergence from a standard normal distribution."""
    return 0.5 * (mean * mean + logvar.exp() - 1.0 - logvar).mean()


def noisy(mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A value of the distribution."""
    return mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(mean.device)


def decibel(mse: float, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio."""
    return 10.0 * math.log10(peak * peak / mse)


def train_spatial(folder: Path, seed: int, plan: Plan, device: str) -> OpenSoraVAE:
    """The frame-by-frame half; afterwards ``x_z`` has mean 0 and deviation 1 in every channel."""
    torch.manual_seed(seed)
    vae = OpenSoraVAE(VAE).to(device)
    half = vae.spatial_vae.module

    def loss(rng: random.Random, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = pictures(rng, FRAMES_A_BATCH).to(device)
        weight = edges(x)
        mean, logvar = half.moments(x)
        error = half.decode(noisy(mean, logvar, generator)) - x
        weighted = (weight * (error.square() + 0.3 * error.abs())).mean()
        mse = float(error.detach().square().mean())
        return weighted + 1e-5 * kl(mean, logvar), {"mse": mse, "dB": decibel(mse)}

    train(plan, half, loss, folder, seed)
    whiten_spatial(vae, pictures(random.Random(seed), 512).to(device))
    torch.save(vae.state_dict(), folder / "spatial.pt")
    return vae


@torch.no_grad()
def whiten_spatial(vae: OpenSoraVAE, frames: torch.Tensor) -> None:
    """Fold each channel's mean and deviation into the 1 × 1 convolutions on both sides of the latent."""
    half = vae.spatial_vae.module
    mean = torch.cat([half.moments(part)[0] for part in frames.split(32)])
    middle = mean.mean(dim=(0, 2, 3))
    factor = 1.0 / (VAE.spatial_scaling * mean.std(dim=(0, 2, 3)))
    c = VAE.spatial.latent_channels
    after, before = half.quant_conv, half.post_quant_conv
    after.weight[:c] *= factor.reshape(-1, 1, 1, 1)
    after.bias[:c] = (after.bias[:c] - middle) * factor
    after.bias[c:] += 2 * factor.log()
    before.bias += before.weight[:, :, 0, 0] @ middle
    before.weight /= factor.reshape(1, -1, 1, 1)


@torch.no_grad()
def spatial_latents(vae: OpenSoraVAE, clip: torch.Tensor) -> torch.Tensor:
    """``x_z`` ``[B, C, T, h, w]`` of pixels, the means."""
    mean = vae.spatial_vae.module.moments(as_frames(clip))[0]
    return as_video(mean, clip.shape[0]) * VAE.spatial_scaling


def train_temporal(folder: Path, seed: int, plan: Plan, device: str) -> OpenSoraVAE:
    """The half that makes 5 latent frames of 17; afterwards ``z`` has mean 0 and deviation 1 in every channel."""
    vae = OpenSoraVAE(VAE).to(device)
    vae.load_state_dict(torch.load(folder / "spatial.pt", weights_only=True))
    half = vae.temporal_vae
    torch.manual_seed(seed + 1)
    for layer in half.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    rng = random.Random(seed)
    seen = split()[0]
    what = [seen[i % len(seen)].varied(rng) for i in range(POOL)]
    clips = [render(scene, Look.draw(rng, scene)) for scene in what]
    pool = torch.cat([spatial_latents(vae, torch.stack(clips[i : i + 4]).to(device)) for i in range(0, POOL, 4)])

    def loss(rng: random.Random, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = pool[[rng.randrange(POOL) for _ in range(CLIPS_A_BATCH)]]
        moving = (x - x.median(dim=2, keepdim=True).values).abs().amax(dim=1, keepdim=True) > 0.3
        mean, logvar = half.moments(x, FRAMES)
        error = half.decode(noisy(mean, logvar, generator), FRAMES) - x
        weighted = ((1.0 + 5.0 * moving) * error.square()).mean()
        mse = float(error.detach().square().mean())
        return weighted + 1e-5 * kl(mean, logvar), {"mse": mse, "dev": float(mean.detach().std(dim=(0, 2, 3, 4)).min())}

    train(plan, half, loss, folder, seed + 1)
    with torch.no_grad():
        mean = torch.cat([half.moments(part, FRAMES)[0] for part in pool.split(12)])
    vae.shift.copy_(mean.mean(dim=(0, 2, 3, 4)).reshape(vae.shift.shape))
    vae.scale.copy_(mean.std(dim=(0, 2, 3, 4)).reshape(vae.scale.shape))
    torch.save(vae.state_dict(), folder / "vae.pt")
    return vae


def cached(seed: int, looks: int, frames: int = FRAMES) -> Iterator[list[tuple[Scene, Look]]]:
    """For every training scene its cached videos: a third in medium size and speed, the others at random."""
    rng = random.Random(seed + frames)
    for scene in split()[0]:
        what = [scene if i % 3 == 0 else scene.varied(rng) for i in range(looks)]
        yield [(one, Look.draw(rng, one)) for one in what]


def train_decoders(folder: Path, seed: int, plan: Plan, device: str) -> OpenSoraVAE:
    """Both decoders together, from cached latents to pixels. Latents stay what they are, and so may a transformer."""
    vae = load_vae(folder, device, "vae.pt")
    z = torch.load(folder / f"latents-{FRAMES}.pt", weights_only=True)
    videos = list(cached(seed, z.shape[1]))
    spatial, temporal = vae.spatial_vae.module, vae.temporal_vae
    decoders = nn.ModuleList([spatial.decoder, spatial.post_quant_conv, temporal.decoder, temporal.post_quant_conv])

    def loss(rng: random.Random, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        which = [(rng.randrange(z.shape[0]), rng.randrange(z.shape[1])) for _ in range(CLIPS_TO_DECODE)]
        times = rng.sample(range(FRAMES), FRAMES_TO_DECODE)
        x = torch.stack([render(*videos[i][k])[:, times] for i, k in which]).to(device)
        latent = torch.stack([z[i, k] for i, k in which])
        latent = latent + UNSURE * torch.randn(latent.shape, generator=generator)
        x, x_z = as_frames(x), vae.decode_temporal(latent.to(device), FRAMES)[:, :, times]
        error = vae.spatial_vae.decode(as_frames(x_z)) - x
        mse = float(error.detach().square().mean())
        return (edges(x) * (error.square() + 0.3 * error.abs())).mean(), {"mse": mse, "dB": decibel(mse)}

    train(plan, decoders, loss, folder, seed + 6)
    torch.save(vae.state_dict(), folder / "vae-final.pt")
    return vae


def load_vae(folder: Path, device: str = "cpu", name: str | None = None) -> OpenSoraVAE:
    """The autoencoder: as saved under ``name``, or else of the last stage that there is."""
    vae = OpenSoraVAE(VAE)
    final = folder / "vae-final.pt"
    path = folder / name if name else final if final.exists() else folder / "vae.pt"
    vae.load_state_dict(torch.load(path, weights_only=True))
    return vae.to(device).eval()


@torch.no_grad()
def reconstruction(vae: OpenSoraVAE, seed: int, what: list[Scene]) -> tuple[float, list[torch.Tensor]]:
    """Decibel of videos of these scenes, encoded and decoded, and these videos."""
    rng, _ = generators(seed, 0)
    errors, made = [], []
    for i in range(len(what)):
        clip = render(what[i], Look.draw(rng, what[i]))
        made.append(vae.decode(vae.encode(clip[None]), FRAMES)[0])
        errors.append(float((made[-1] - clip).square().mean()))
    return decibel(sum(errors) / len(what)), made
