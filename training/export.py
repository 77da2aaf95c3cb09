"""Writes what was trained in the official layout: one folder a component, and a model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training.autoencoder import load_vae
from training.diffusion import load_flow
from training.grammar import BACKGROUNDS, COLOURS, HELD_OUT, MOTIONS, SHAPES, Scene, scenes
from training.language import load_text_encoder
from training.sizes import TRANSFORMER, VAE

SIZE_LIMIT = 12_000_000


def export(folder: Path, into: Path) -> int:
    """Replace the components below ``into``; the number of bytes they take.

    Raises:
        RuntimeError: they are larger than a repository should carry.
    """
    encoder = load_text_encoder(folder)
    config = dataclasses.asdict(encoder.config) | {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    state = {k: v for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    write(into / "text_encoder", config, state)
    (into / "text_encoder" / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())

    flow, _ = load_flow(folder)
    write(into / "transformer", dataclasses.asdict(TRANSFORMER), flow.model.state_dict())

    vae = load_vae(folder)
    config = dataclasses.asdict(VAE)
    config["shift"], config["scale"] = (buffer.flatten().tolist() for buffer in (vae.shift, vae.scale))
    write(into / "vae", config, vae.state_dict())

    for name in ("text_encoder", "transformer", "vae"):
        (into / name / "README.md").write_text(card(json.loads((folder / "figures.json").read_text())))
    total = sum(f.stat().st_size for f in into.rglob("*") if f.is_file())
    if total > SIZE_LIMIT:
        raise RuntimeError(f"the checkpoint takes {total} bytes, more than {SIZE_LIMIT}")
    return total


def card(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The model card, with the run's own figures."""
    tried = figures["evaluate"]
    shares = "\n".join(
        f"| {name} | {tried[name]:.1%} |" for name in ("shape", "colour", "background", "axis", "sign", "all")
    )
    stages = "\n".join(
        f"| {name} | {f['steps']:.0f} | {f['lr']:g} | {f['seed']:.0f} | {_losses(f)} |"
        for name, f in figures.items()
        if "lr" in f
    )
    return CARD.format(
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS),
        motions=", ".join(MOTIONS),
        prompt=Scene("circle", "red", "blue", "left to right").prompt(),
        held_out=HELD_OUT,
        scenes=len(scenes()),
        shares=shares,
        stages=stages,
        n=tried["n"],
        guidance=tried["guidance"],
        overlap=tried["overlap"],
        decibel=figures["check"]["dB"],
    )


def _losses(stage: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in stage.items() if k not in ("steps", "lr", "seed"))


CARD = """# Tiny Open-Sora

A miniature of Open-Sora 1.2: the true architecture and the names of the true checkpoints, so small that it lives in
this repository. It makes videos of 64 x 64 pixels and 17 frames of one moving shape, from prompts such as
"{prompt}".
Made from scratch by `training/`, from drawn videos alone; no weights, pictures or captions of others went in.

It knows these words:

- shapes: {shapes}
- colours: {colours}
- backgrounds: {backgrounds}
- motions: {motions}

## How well it does

Videos of {n} prompts from the {held_out} combinations of {scenes} that it never saw in training, 30 steps, guidance
{guidance:g}, averaged weights in float32, read off the frames by `training/judge.py`:

| right | share |
|---|---|
{shares}

The shape's overlap with a perfect drawing is {overlap:.2f} on average. The autoencoder alone gives held-out videos
back at {decibel:.1f} dB.

## How it was made

`python -m training.train STAGE` for each stage in turn; figures are means over the last logged steps.

| stage | steps | learning rate | seed | at its end |
|---|---|---|---|---|
{stages}

The tokenizer and the text encoder learn the grammar's words (the encoder by naming a prompt's attributes), the
autoencoder its pictures, and the transformer rectified flow on cached latents with an eighth of the prompts dropped.
Weights are stored as float16.

## What it cannot do

Anything else: other words, several shapes, other sizes than 64 x 64, real pictures. Clips longer than 17 frames were
not trained on. Its quality under a technique says which way the technique pulls, not how far it would pull the real
model: at 64 x 64 the official schedule takes few steps at high noise.
"""


def write(folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """``config.json`` and ``model.safetensors``, floats as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    half = {k: v.detach().half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
    path = folder / "model.safetensors"
    save_file(half, path, metadata={"format": "pt"})
    path.chmod(0o644)
