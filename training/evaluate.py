"""How often a trained model's videos show what their prompts say, on scenes that it has never seen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from toolchain.formats.schedule import Step, plan_steps
from toolchain.models.open_sora_v1_2.t5 import T5Encoder
from toolchain.models.open_sora_v1_2.timesteps import timesteps
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE
from toolchain.player.sampler import initial_noise, sample
from training.autoencoder import load_vae, reconstruction
from training.diffusion import Flow, load_flow
from training.grammar import FRAMES, LONG_FRAMES, SIZE, Look, Scene, render, split
from training.judge import ATTRIBUTES, judge
from training.language import Tokenized, load_text_encoder
from training.loop import record

STEPS = 30
GUIDANCE = 2.5
BATCH = 8
BROKEN = 0.1
"""Share of a shape that may hang apart from the rest; more in any frame, and it is broken."""
KINDS = ("held-out", "sizes-and-speeds", "34-frames", "seen")
"""What can be evaluated on: held-out scenes in medium size and speed; in random ones; these with more frames; seen."""


class Videos:
    """Everything of a training folder that makes videos."""

    def __init__(self, folder: Path) -> None:
        self.tokenized = Tokenized(folder)
        self.encoder: T5Encoder = load_text_encoder(folder)
        self.vae: OpenSoraVAE = load_vae(folder)
        self.flow: Flow
        self.flow, self.steps = load_flow(folder)

    @torch.no_grad()
    def latents(self, prompts: list[str], seeds: Sequence[int], guidance: float, frames: int = FRAMES) -> torch.Tensor:
        """``z`` of a prompt and a seed each, by the toolchain's own sampler."""
        ids, mask = self.tokenized(prompts)
        null = self.flow.model.y_embedder.y_embedding.expand(len(prompts), -1, -1)
        y, masks = torch.cat((self.encoder(ids, mask), null)), torch.cat((mask, mask))
        latent = (4, *self.vae.latent_size(frames, SIZE, SIZE))
        z = torch.from_numpy(np.concatenate([initial_noise(seed, (1, *latent)) for seed in seeds]))

        def denoiser(z_pair: torch.Tensor, step: Step, _: object) -> torch.Tensor:
            return self.flow.velocity(z_pair, torch.full((len(z_pair),), step.t / 1000.0), y, masks)

        schedule = timesteps(STEPS, height=SIZE, width=SIZE, frames=frames)
        return sample(denoiser, z, plan_steps(schedule), guidance=guidance)

    @torch.no_grad()
    def make(
        self, prompts: list[str], seeds: Sequence[int], guidance: float, frames: int = FRAMES
    ) -> list[torch.Tensor]:
        """Videos ``[3, F, 64, 64]``."""
        made: list[torch.Tensor] = []
        for i in range(0, len(prompts), BATCH):
            z = self.latents(prompts[i : i + BATCH], seeds[i : i + BATCH], guidance, frames)
            made += [self.vae.decode(one[None], frames)[0] for one in z]
        return made


def accuracy(videos: list[torch.Tensor], what: list[Scene]) -> dict[str, float]:
    """Shares of videos: each thing right, all right, a shape in parts; mean and least overlap with a perfect shape."""
    right: Counter[str] = Counter()
    overlaps = []
    broken = 0
    for video, scene in zip(videos, what, strict=True):
        reading = judge(video)
        correct = reading.correct(scene)
        right.update(k for k, v in correct.items() if v)
        right["all"] += all(correct.values())
        overlaps.append(reading.overlap)
        broken += reading.apart > BROKEN
    n = len(videos)
    shares = {k: right[k] / n for k in (*ATTRIBUTES, "all")}
    return shares | {"overlap": sum(overlaps) / n, "least": min(overlaps), "broken": broken / n, "n": n}


def evaluate(folder: Path, guidance: float, seeds: int, kind: str = KINDS[0]) -> dict[str, float]:
    """Accuracy on the scenes of one of :data:`KINDS`, ``seeds`` videos each; writes ``sheet-<kind>.png``."""
    videos = Videos(folder)
    seen, held_out = split()
    scenes = seen[:: len(seen) // len(held_out)][: len(held_out)] if kind == "seen" else held_out
    what = [scene for _ in range(seeds) for scene in scenes]
    if kind in ("sizes-and-speeds", "34-frames"):
        rng = random.Random(0)
        what = [scene.varied(rng) for scene in what]
    frames = LONG_FRAMES if kind == "34-frames" else FRAMES
    made = videos.make([s.prompt() for s in what], range(len(what)), guidance, frames)
    sheet(made[:24], folder / f"sheet-{kind}.png", every=frames // 8)
    figures = accuracy(made, what) | {"steps": videos.steps, "guidance": guidance}
    record(folder, f"evaluate-{kind}", figures)
    return figures


def check_judge(folder: Path, seed: int) -> None:
    """The judge on rendered and on reconstructed videos; the latter's quality."""
    rng = random.Random(seed)
    what = [scene.varied(rng) for scene in split()[1] * 2]
    rendered = accuracy([render(s, Look.draw(rng, s)) for s in what], what)
    quality, made = reconstruction(load_vae(folder), seed, what)
    rebuilt = accuracy(made, what)
    print("judge on rendered videos:", rendered)
    print("judge on reconstructions:", rebuilt)
    print(f"autoencoder on held-out videos: {quality:.2f} dB")
    record(folder, "check", {"dB": quality, "rendered": rendered["all"], "rebuilt": rebuilt["all"], "n": rebuilt["n"]})
    sheet(made[:24], folder / "reconstructed.png")


def sheet(videos: list[torch.Tensor], path: Path, every: int = 2, zoom: int = 2) -> None:
    """A picture of videos, one a row, some of its frames."""
    rows = []
    for video in videos:
        frames = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0)[::every]
        rows.append(torch.cat(list(frames), dim=1))
    picture = Image.fromarray(torch.cat(rows, dim=0).numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
