"""What steps lose that take things from earlier ones: measured on a video in which every step computes everything.

The velocity of each step is made again from the same latents, once for every earlier step that its blocks could
reuse. Errors are in units that add up over steps: the change of the latents, |dt| · ‖v' - v‖, as a root mean square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from toolchain.accuracy.eager import EagerPipeline
from toolchain.formats.schedule import Step
from toolchain.planning.step_search import StepErrors


@dataclass(frozen=True)
class _Call:
    """A step of the whole run: the latents that went in, and the halves ``[1, C, T, H, W]`` that came out."""

    step: Step
    latents: torch.Tensor
    conditional: torch.Tensor
    unconditional: torch.Tensor

    def velocity(self, guidance: float) -> torch.Tensor:
        return self.unconditional + guidance * (self.conditional - self.unconditional)


@torch.no_grad()
def step_errors(pipeline: EagerPipeline, y: torch.Tensor, mask: torch.Tensor, seed: int) -> StepErrors:
    """The errors of the steps of one video.

    Beside the models it holds what one step's range added and, for every step, five times the latents. For n steps it
    takes 2 · n calls of the denoiser, and n · (n - 1) / 2 calls without the range.

    Args:
        pipeline: its sampler names the range; where steps of it leave something out, all is computed instead.
        y, mask: the prompt, as :meth:`EagerPipeline.encode` gives it.
    """
    denoiser, guidance = pipeline.denoiser(y, mask), pipeline.recipe.sampler.guidance
    (range_,) = pipeline.ranges
    channels = pipeline.geometry.latent_channels

    def call(step: Step, z: torch.Tensor) -> _Call:
        halves = denoiser(torch.cat((z, z)), step, None)[:, :channels]
        return _Call(step, z, halves[:1], halves[1:])

    whole: list[_Call] = []
    z = pipeline.noise(seed)
    for step in pipeline.whole_steps:
        whole.append(call(step, z))
        z = z + whole[-1].velocity(guidance) * step.dt
    differences = torch.stack([(w.conditional - w.unconditional).flatten() for w in whole])
    n = len(whole)
    reused, alone, kept = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n, n))
    for a, computing in enumerate(whole):
        call(computing.step, computing.latents)  # keeps what its range added
        for j in range(a, n):
            true = whole[j]
            made = true if j == a else call(replace(true.step, reuse=range_), true.latents)
            off = [made.velocity(guidance), made.conditional]
            both, one = ((v - true.velocity(guidance)).flatten() for v in off)
            reused[a, j], alone[a, j] = _change(true.step, both), _change(true.step, one)
            if j:
                with_difference = one + (guidance - 1.0) * differences[:j]
                kept[a, :j, j] = [_change(true.step, row) for row in with_difference]
    return StepErrors(reused, alone, kept)


def _change(step: Step, off: torch.Tensor) -> float:
    """How far a step leads elsewhere with a velocity that is so far off."""
    return abs(step.dt) * float(off.double().square().mean().sqrt())


def mean_errors(each: Sequence[StepErrors]) -> StepErrors:
    """The errors of several videos of the same steps, averaged."""
    tables = zip(*((e.reused, e.alone, e.kept) for e in each), strict=True)
    return StepErrors(*(np.mean(np.stack(own), axis=0) for own in tables))
