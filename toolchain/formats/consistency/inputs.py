"""What a component is fed and gives, against the geometry, the prompt's length, and its tables."""

from __future__ import annotations

import math

from toolchain.formats.consistency.shapes import asked_functions, result
from toolchain.formats.manifest import Component, ComponentInput, Manifest
from toolchain.ir.feeds import TextEmbedding

FED = {"text_encoder": "token_ids", "transformer": "latents"}
"""What a component has to be fed; without it, it would give the same whatever it is asked."""
HALVES = 2
"""Of guidance: with the prompt and without it."""


def check_feeds(manifest: Manifest) -> None:
    """Hold the inputs of components against what feeds them, and texts' embeddings against what takes them.

    Raises:
        ValueError: names the input.
    """
    for what, own, needed in (("text", manifest.text, "text_encoder"), ("decoding", manifest.decoding, "vae")):
        if (own is not None) != (needed in manifest.components):
            raise ValueError(f"{what}: there is one of {what} and the component '{needed}', and not the other")
    for name, component in manifest.components.items():
        if name in FED and all(i.feed.kind != FED[name] for i in component.inputs):
            raise ValueError(f"components.{name}.inputs: none is fed {FED[name]}")
        asked = asked_functions(manifest, name)
        # whatever is one number everywhere is no larger than the values that it goes with
        others = [math.prod(i.shape) for i in component.inputs if i.feed.kind not in ("constant", "timestep")]
        for given in component.inputs:
            where = f"components.{name}.inputs.{given.name}"
            if given.rate not in asked:
                raise ValueError(f"{where}: no block runs at rate '{given.rate}'")
            if given.feed.kind in ("constant", "timestep") and math.prod(given.shape) > max(others, default=1):
                raise ValueError(f"{where}: {given.shape} is more than all that it goes with")
            _check_feed(where, manifest, component, given)


def _check_feed(where: str, manifest: Manifest, component: Component, given: ComponentInput) -> None:
    g, feed = manifest.geometry, given.feed
    if feed.kind in ("token_ids", "token_mask") and manifest.text is not None:
        tokens = manifest.text.max_tokens
        if len(given.shape) != 2 or given.shape[1] != tokens or given.shape[0] > HALVES:
            raise ValueError(f"{where}: {given.shape} is not of text.max_tokens {tokens}")
    elif feed.kind == "latents":
        wanted = [HALVES, g.latent_channels, g.latent_frames, g.latent_height, g.latent_width]
        if given.shape != wanted:
            raise ValueError(f"{where}: {given.shape}, but by geometry latents of both halves are {wanted}")
    elif feed.kind == "frame_mask":
        if len(given.shape) != 2 or given.shape[0] > HALVES or given.shape[1] != g.latent_frames:
            raise ValueError(f"{where}: {given.shape} is not of geometry.latent_frames {g.latent_frames}")
    elif isinstance(feed, TextEmbedding):
        table = next(t for t in component.tables if t.name == feed.unconditional)
        if given.shape != [HALVES, *table.shape]:
            raise ValueError(f"{where}: {given.shape}, but the table '{table.name}' is {table.shape} for one half")
        encoder = manifest.components.get("text_encoder")
        for output in encoder.results("text_embedding") if encoder is not None else []:
            shape = result(encoder, output.source)[1].shape if encoder is not None else []
            if shape != [1, *table.shape]:
                raise ValueError(f"{where}: the text encoder gives {shape}, not {[1, *table.shape]}")
