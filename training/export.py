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
from training.evaluate import KINDS
from training.grammar import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    SIZE_WORDS,
    SPEED_WORDS,
    Scene,
    scenes,
)
from training.judge import ATTRIBUTES
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
    tried = [figures[f"evaluate-{kind}"] for kind in KINDS[:3]]
    names = {a: a for a in ATTRIBUTES} | {"all": "all of these", "broken": "shape in parts, in any frame"}
    names |= {"overlap": "overlap, mean", "least": "overlap, least"}
    shares = "\n".join(
        f"| {name} | {' | '.join(f'{t[a]:.2f}' if 'overlap' in name else f'{t[a]:.1%}' for t in tried)} |"
        for a, name in names.items()
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
        sizes=", ".join(word for words in SIZE_WORDS.values() for word in words if word),
        speeds=", ".join(word for words in SPEED_WORDS.values() for word in words if word),
        prompt=Scene("circle", "red", "blue", "left to right").prompt(),
        longer=Scene("square", "yellow", "black", "up", "small", "fast").prompt(),
        held_out=HELD_OUT,
        scenes=len(scenes()),
        shares=shares,
        stages=stages,
        n=tried[0]["n"],
        guidance=tried[0]["guidance"],
        decibel=figures["check"]["dB"],
        rebuilt=figures["check"]["rebuilt"],
    )


def _losses(stage: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in stage.items() if k not in ("steps", "lr", "seed"))


CARD = """# Tiny Open-Sora

A miniature of Open-Sora 1.2: the true architecture and the names of the true checkpoints, so small that it lives in
this repository. It makes videos of 64 x 64 pixels and 17 or 34 frames of one moving shape, from prompts such as
"{prompt}" or
"{longer}".
Made from scratch by `training/`, from drawn videos alone; no weights, pictures or captions of others went in.

It knows these words:

- shapes: {shapes}
- colours: {colours}
- backgrounds: {backgrounds}
- motions: {motions}
- sizes: {sizes}; medium without a word
- speeds: {speeds}; medium without a word. A speed is how far the shape gets in the whole clip

## How well it does

Videos of {n} prompts each, from the {held_out} combinations of {scenes} of shape, colour, background and motion that it
never saw in training; 30 steps, guidance {guidance:g}, averaged weights in float32, read off the frames by
`training/judge.py`. Shares are of all videos:

| right | no size or speed named, 17 frames | sizes and speeds at random, 17 frames | the same, 34 frames |
|---|---|---|---|
{shares}

A shape is in parts when more than a tenth of it hangs apart from the rest. The overlap is of the moving thing with
the most similar perfect shape, 1 being perfect: the mean of a video's frames, then the mean and the least of all
videos. The autoencoder alone gives held-out videos back at {decibel:.1f} dB, and {rebuilt:.1%} of those with everything
right.

## How it was made

`python -m training.train STAGE` for each stage in turn; figures are means over the last logged steps. See
`training/README.md` for what these weights had learnt before.

| stage | steps | learning rate | seed | at its end |
|---|---|---|---|---|
{stages}

The tokenizer and the text encoder learn the grammar's words (the encoder by naming a prompt's attributes), the
autoencoder its pictures, and the transformer rectified flow on cached latents with an eighth of the prompts dropped.
Weights are stored as float16.

## What it cannot do

Anything else: other words, several shapes, other sizes than 64 x 64, real pictures. Other lengths than 17 and 34
frames were not trained on. Small squares are often so round that they pass for circles, large circles have dents, and
a faint mark stays in gray backgrounds; the autoencoder makes that one.

Its quality under a technique says which way the technique pulls, not how far it would pull the real model: at 64 x 64
the official schedule takes few steps at high noise.
"""


def write(folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """``config.json`` and ``model.safetensors``, floats as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    half = {k: v.detach().half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
    path = folder / "model.safetensors"
    save_file(half, path, metadata={"format": "pt"})
    path.chmod(0o644)
