"""How often a trained model's videos show what their prompts say, on scenes that it has never seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from toolchain.models.t5 import T5Encoder
from toolchain.models.vae import OpenSoraVAE
from toolchain.sampler import initial_noise, sample
from toolchain.schedule import timesteps
from training.autoencoder import load_vae, reconstruction
from training.diffusion import Flow, load_flow
from training.grammar import FRAMES, SIZE, Look, Scene, render, split
from training.judge import judge
from training.language import Tokenized, load_text_encoder
from training.loop import record

STEPS = 30
GUIDANCE = 2.5


class Videos:
    """Everything of a training folder that makes videos."""

    def __init__(self, folder: Path) -> None:
        self.tokenized = Tokenized(folder)
        self.encoder: T5Encoder = load_text_encoder(folder)
        self.vae: OpenSoraVAE = load_vae(folder)
        self.flow: Flow
        self.flow, self.steps = load_flow(folder)

    @torch.no_grad()
    def latents(self, prompts: list[str], seeds: Sequence[int], guidance: float, steps: int = STEPS) -> torch.Tensor:
        """``z`` of a prompt and a seed each, by the toolchain's own sampler."""
        ids, mask = self.tokenized(prompts)
        null = self.flow.model.y_embedder.y_embedding.expand(len(prompts), -1, -1)
        y, masks = torch.cat((self.encoder(ids, mask), null)), torch.cat((mask, mask))
        latent = (4, *self.vae.latent_size(FRAMES, SIZE, SIZE))
        z = torch.from_numpy(np.concatenate([initial_noise(seed, (1, *latent)) for seed in seeds]))

        def denoiser(z_pair: torch.Tensor, t: float, _: object, __: bool) -> torch.Tensor:
            return self.flow.velocity(z_pair, torch.full((len(z_pair),), t / 1000.0), y, masks)

        schedule = timesteps(steps, height=SIZE, width=SIZE, frames=FRAMES)
        return sample(denoiser, z, schedule, guidance=guidance)

    @torch.no_grad()
    def make(self, prompts: list[str], seeds: Sequence[int], guidance: float, batch: int = 8) -> list[torch.Tensor]:
        """Videos ``[3, F, 64, 64]``."""
        made: list[torch.Tensor] = []
        for i in range(0, len(prompts), batch):
            z = self.latents(prompts[i : i + batch], seeds[i : i + batch], guidance)
            made += [self.vae.decode(one[None], FRAMES)[0] for one in z]
        return made


def accuracy(videos: list[torch.Tensor], what: list[Scene]) -> dict[str, float]:
    """Share of right shapes, colours, backgrounds, axes and signs; share of all right; mean overlap of the shape."""
    right: Counter[str] = Counter()
    overlap = 0.0
    for video, scene in zip(videos, what, strict=True):
        reading = judge(video)
        correct = reading.correct(scene)
        right.update(k for k, v in correct.items() if v)
        right["all"] += all(correct.values())
        overlap += reading.overlap
    n = len(videos)
    shares = {k: right[k] / n for k in ("shape", "colour", "background", "axis", "sign", "all")}
    return shares | {"overlap": overlap / n, "n": n}


def evaluate(folder: Path, guidance: float, seeds: int, seen: bool = False) -> dict[str, float]:
    """Accuracy on held-out scenes, ``seeds`` videos each; writes ``sheet.png``. ``seen`` takes as many seen ones."""
    videos = Videos(folder)
    scenes = split()[0][:: len(split()[0]) // len(split()[1])][: len(split()[1])] if seen else split()[1]
    what = [scene for _ in range(seeds) for scene in scenes]
    made = videos.make([s.prompt() for s in what], range(len(what)), guidance)
    sheet(made[:12], folder / "sheet.png")
    figures = accuracy(made, what) | {"steps": videos.steps, "guidance": guidance}
    record(folder, "evaluate-seen" if seen else "evaluate", figures)
    return figures


def check_judge(folder: Path, seed: int) -> None:
    """The judge on rendered and on reconstructed videos; the latter's quality."""
    held_out = split()[1]
    rendered = accuracy([render(s, Look()) for s in held_out], held_out)
    quality, made = reconstruction(load_vae(folder), seed)
    rebuilt = accuracy(made, [held_out[i % len(held_out)] for i in range(len(made))])
    print("judge on rendered videos:", rendered)
    print("judge on reconstructions:", rebuilt)
    print(f"autoencoder on held-out videos: {quality:.2f} dB")
    record(folder, "check", {"dB": quality, "rendered": rendered["all"], "rebuilt": rebuilt["all"], "n": rebuilt["n"]})
    sheet(made[:6], folder / "reconstructed.png")


def sheet(videos: list[torch.Tensor], path: Path, every: int = 2, zoom: int = 2) -> None:
    """A picture of videos, one a row, every other frame."""
    rows = []
    for video in videos:
        frames = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0)[::every]
        rows.append(torch.cat(list(frames), dim=1))
    picture = Image.fromarray(torch.cat(rows, dim=0).numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
