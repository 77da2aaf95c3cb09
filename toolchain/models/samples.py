"""Inputs as a real run has them: unit variance, a padded prompt, a timestep whatever the sampler's settings."""

from __future__ import annotations

import torch

from toolchain.ir.feeds import Constant
from toolchain.ir.graph import Input

SMALL_VOCABULARY = 32
"""Ids below this are tokens in every vocabulary."""


def sample_input(spec: Input, generator: torch.Generator) -> torch.Tensor:
    """A component's input, of ``spec``'s shape, by what feeds it."""
    if isinstance(spec.feed, Constant):
        return torch.full(spec.shape, spec.feed.value)
    match spec.feed.kind:
        case "timestep":
            return torch.full(spec.shape, 1000.0 * float(torch.rand((), generator=generator)))
        case "token_mask":
            length = int(torch.randint(1, spec.shape[1] + 1, (), generator=generator))
            return (torch.arange(spec.shape[1]) < length).float().expand(spec.shape).contiguous()
        case "frame_mask":
            return (torch.rand(spec.shape, generator=generator) < 0.5).float()
        case "token_ids":
            return torch.randint(0, SMALL_VOCABULARY, spec.shape, generator=generator, dtype=spec.dtype)
        case "pixels":
            return torch.rand(spec.shape, generator=generator) * 2 - 1
        case _:
            return torch.randn(spec.shape, generator=generator)
