"""The stages that train the transformer: cached latents, then rectified flow on them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from targets.forms.attention import attend_in_batches
from toolchain.ir.contracts import AttentionLeaf
from toolchain.models.open_sora_v1_2.stdit3 import STDiT3
from training.autoencoder import cached, load_vae
from training.grammar import FRAMES, KINDS, LONG_FRAMES, SIZE, Scene, render, split
from training.language import Tokenized, load_text_encoder
from training.loop import Plan, train
from training.sizes import FPS, TRANSFORMER, frame_frequencies, start_transformer

FLOW = Plan("transformer", steps=11000, lr=1e-3, warmup=200, ema=0.998)
CLIPS_A_BATCH = 24
LOOKS = {FRAMES: 18, LONG_FRAMES: 6}
"""Cached videos a scene, by their number of frames."""
LONG_EVERY = 4
"""One batch in so many is of long videos, with half as many of them."""
LATENT_FRAMES = 10
"""Of the longest videos: two chunks of the autoencoder."""
DROPPED = 0.12
"""Share of prompts replaced by "no prompt", which guidance needs."""
PROBE_WEIGHT = 0.2
WORDINGS = 5
"""Cached wordings of a scene in a size and a speed; the first is the plainest and is taken half of the time."""


def cache_latents(folder: Path, seed: int, device: str) -> None:
    """``latents-<frames>.pt``: ``z`` of the videos of every training scene ``[scenes, looks, C, t, h, w]``."""
    vae = load_vae(folder, device, "vae.pt")
    for frames, looks in LOOKS.items():
        latents = []
        with torch.no_grad():
            for videos in cached(seed, looks, frames):
                clips = torch.stack([render(scene, look, frames) for scene, look in videos])
                latents.append(torch.cat([vae.encode(part.to(device)).cpu() for part in clips.split(4)]))
        z = torch.stack(latents)
        torch.save(z, folder / f"latents-{frames}.pt")
        channels = z.transpose(0, 2).flatten(1)
        print(f"latents: {tuple(z.shape)}, mean {channels.mean(1).tolist()}, deviation {channels.std(1).tolist()}")


def timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps to train on, 0 … 1, 1 noise.

    Logit-normal, but three in ten lie near the noise, where the official sampler takes its largest steps at this
    size (1, .89, .80, .72, …) and where the prompt alone decides what moves which way.
    """
    middle = torch.sigmoid(torch.randn(count, generator=generator))
    high = 1.0 - 0.15 * torch.rand(count, generator=generator)
    first = torch.ones(count)
    chance = torch.rand(count, generator=generator)
    return torch.where(chance < 0.1, first, torch.where(chance < 0.35, high, middle))


class Flow(nn.Module):
    """The transformer, and a probe that only training has.

    The probe names each token's frame from what the second pair of blocks made of it. At pure noise nothing else
    asks the model to find that out, yet only who knows it can say where in the picture the shape is when.
    """

    def __init__(self, model: STDiT3) -> None:
        super().__init__()
        self.model = model
        self.probe = nn.Linear(model.config.hidden_size, LATENT_FRAMES)
        self._hidden: torch.Tensor | None = None
        model.temporal_blocks[1].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: object, out: torch.Tensor) -> None:
        self._hidden = out

    def velocity(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, C, T, H, W]``, ``t`` ``[B]`` 0 … 1, ``y`` ``[B, L, d]``, ``mask`` ``[B, L]``."""
        size = torch.tensor([float(SIZE)])
        fps = torch.tensor([FPS], device=x.device)
        out = self.model(x, t * 1000.0, y[:, None], mask, fps=fps, height=size, width=size)
        return out[:, : x.shape[1]]

    def frame_loss(self, frames: int) -> torch.Tensor:
        """Cross entropy of the probe for the last call, whose videos had so many latent frames."""
        assert self._hidden is not None
        hidden = F.layer_norm(self._hidden, self._hidden.shape[-1:])
        scores = self.probe(hidden)
        tokens = scores.shape[1] // frames
        frame = torch.arange(frames, device=scores.device).repeat_interleave(tokens)
        return F.cross_entropy(scores.flatten(0, 1), frame.repeat(len(scores)))


def new_flow(seed: int) -> Flow:
    """An untrained transformer."""
    torch.manual_seed(seed + 4)
    model = STDiT3(TRANSFORMER)
    frame_frequencies(model)
    start_transformer(model)
    flow = Flow(model)
    nn.init.zeros_(flow.probe.bias)
    return flow


def train_transformer(folder: Path, seed: int, plan: Plan, device: str) -> Flow:
    """The transformer on cached latents, the text encoder as it is."""
    seen = split()[0]
    cache = {frames: torch.load(folder / f"latents-{frames}.pt", weights_only=True).to(device) for frames in LOOKS}
    kinds = {f: torch.tensor([[s.kind() for s, _ in row] for row in cached(seed, n, f)]) for f, n in LOOKS.items()}
    texts, masks = encoded(folder, seed, seen, device)
    flow = new_flow(seed).to(device)
    null = flow.model.y_embedder.y_embedding
    for module in flow.modules():
        if isinstance(module, AttentionLeaf):
            module.kernel = attend_in_batches  # its backward pass is the faster on CPUs, in bfloat16 by far

    def loss(rng: random.Random, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        long = rng.randrange(LONG_EVERY) == 0
        frames, count = (LONG_FRAMES, CLIPS_A_BATCH // 2) if long else (FRAMES, CLIPS_A_BATCH)
        z = cache[frames]
        which = torch.tensor([rng.randrange(len(z)) for _ in range(count)])
        look = torch.tensor([rng.randrange(z.shape[1]) for _ in which])
        word = torch.tensor([rng.randrange(WORDINGS) if rng.random() < 0.5 else 0 for _ in which])
        kind = kinds[frames][which, look]
        x0 = z[which, look]
        noise = torch.randn(x0.shape, generator=generator).to(device)
        t = timesteps(len(which), generator).to(device)
        dropped = torch.rand(len(which), generator=generator).to(device) < DROPPED
        y = torch.where(dropped[:, None, None], null, texts[which, kind, word])
        share = t.reshape(-1, 1, 1, 1, 1)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            predicted = flow.velocity((1 - share) * x0 + share * noise, t, y, masks[which, kind, word])
            frame = flow.frame_loss(x0.shape[2])
        error = (predicted.float() - (x0 - noise)).square().mean(dim=(1, 2, 3, 4))
        figures = {"flow": float(error.detach().mean()), "frame": float(frame.detach())}
        for name, those in (("t=1", t == 1.0), (".85-1", (t >= 0.85) & (t < 1.0)), ("<.85", t < 0.85)):
            figures[name] = float(error.detach()[those & ~dropped].mean().nan_to_num())
        return error.mean() + PROBE_WEIGHT * frame, figures

    return train(plan, flow, loss, folder, seed + 4)


@torch.no_grad()
def encoded(folder: Path, seed: int, what: list[Scene], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Each scene's prompts: ``[scenes, kinds, wordings, L, d]``, and masks; a kind is a size and a speed."""
    tokenized, encoder = Tokenized(folder), load_text_encoder(folder, device)
    rng = random.Random(seed + 5)
    texts, masks = [], []
    for scene in what:
        prompts = []
        for one in (scene.of_kind(kind) for kind in range(KINDS)):
            prompts += [one.prompt()] + [one.worded(rng) for _ in range(WORDINGS - 1)]
        ids, mask = tokenized(prompts)
        texts.append(encoder(ids.to(device), mask.to(device)).unflatten(0, (KINDS, WORDINGS)))
        masks.append(mask.to(device).unflatten(0, (KINDS, WORDINGS)))
    return torch.stack(texts), torch.stack(masks)


def load_flow(folder: Path, device: str = "cpu", name: str = "transformer") -> tuple[Flow, int]:
    """The averaged transformer of the last checkpoint, and the steps it was trained for."""
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    flow = Flow(STDiT3(TRANSFORMER))
    flow.load_state_dict(saved["average"])
    return flow.to(device).eval(), saved["step"]
