"""A second reader of manifests: latents worked out from what the manifest says, with none of the player's code."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from toolchain.formats.bundle import Bundle
from toolchain.player.opening import open_engine
from toolchain.player.sampler import initial_noise


def replay(
    bundle: Bundle, y: torch.Tensor, mask: torch.Tensor, seed: int, log: list[str | None] | None = None
) -> torch.Tensor:
    """Latents: the manifest's steps, done one by one with nothing but what it says of them; logs what each reuses."""
    m, s, denoiser = bundle.manifest, bundle.manifest.sampler, bundle.manifest.components["transformer"]
    g = m.geometry
    tables = load_file(bundle.path / denoiser.tables_file.path) if denoiser.tables_file else {}
    blocks = {b.name: b for b in denoiser.blocks}
    types = {f"{b.name}.{o.name}": getattr(torch, o.dtype) for b in denoiser.blocks for o in b.outputs}
    engines = {name: open_engine(bundle, "transformer", block) for name, block in blocks.items()}
    z = torch.from_numpy(initial_noise(seed, (1, g.latent_channels, g.latent_frames, g.latent_height, g.latent_width)))
    values: dict[str, torch.Tensor] = {f"tables.{name}": table for name, table in tables.items()}
    added: dict[str, torch.Tensor] = {}
    total, previous, difference = 0.0, torch.zeros(0), torch.zeros(0)
    log = [] if log is None else log

    def call(name: str, function: str) -> None:
        own = function if function in blocks[name].functions else denoiser.default_function
        taken = {i.name: values[i.source] for i in blocks[name].inputs}
        values.update({f"{name}.{k}": v for k, v in engines[name](own, taken).items()})

    for at, step in enumerate([None, *s.steps], -1):
        for i in denoiser.inputs:
            value: Any = {
                "latents": z,
                "timestep": torch.tensor(0.0 if step is None else step.timestep),
                "token_mask": mask,
                "text_embedding": torch.cat((y, tables[i.feed.unconditional][None]))
                if i.feed.kind == "text_embedding"
                else None,
                "constant": torch.tensor(getattr(i.feed, "value", 0.0)),
            }[i.feed.kind]
            halves = 1 if step is not None and step.guidance == "conditional" and i.rate == "step" else 2
            values[f"inputs.{i.name}"] = value.expand(halves, *i.shape[1:])
        if step is None:
            for name in denoiser.load_order.get("prompt", []):
                call(name, denoiser.default_function)
            continue
        reuse = step.reuse
        for name in denoiser.load_order["step"]:
            if s.rule and name == s.ranges[s.rule.range].blocks[0]:
                value = values[s.rule.observes].double()
                if at:
                    change = (value - previous).abs().mean() / previous.abs().mean()
                    total += sum(c * change.item() ** n for n, c in enumerate(reversed(s.rule.polynomial)))
                previous = value
                if s.rule.first <= at < len(s.steps) - s.rule.last and total < s.rule.threshold:
                    reuse = s.rule.range
                else:
                    total = 0.0
            left_out = s.ranges[reuse].blocks if reuse else []
            if name not in left_out:
                call(name, step.function)
            elif name == left_out[-1]:
                own = s.ranges[reuse]
                now = values[own.input]  # the sum is of float32, whatever crosses between blocks
                values[own.output] = (now.float() + added[reuse][: len(now)].float()).to(types[own.output])
        log.append(reuse)
        for name, own in s.ranges.items():
            if not set(own.blocks) & set(left_out):
                kept = values[own.output].float() - values[own.input].float()
                added[name] = kept.to(types[own.output])
        (prediction,) = [values[o.source] for o in denoiser.outputs if o.gives == "prediction"]
        c, *unconditional = prediction[:, : g.latent_channels]
        if unconditional:
            difference = c - unconditional[0]
            velocity = unconditional[0] + s.guidance * difference
        else:
            velocity = c + (s.guidance - 1) * difference if s.difference == "last" else c
        z = z + velocity[None] * step.dt
    return z
