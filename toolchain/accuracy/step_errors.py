"""What steps lose that take things from earlier ones: measured on a video in which every step computes everything.

The velocity of each step is made again from the same latents, once for every earlier step that its blocks could
reuse. Errors are in units that add up over steps: the change of the latents, |dt| · ‖v' - v‖, as a root mean square.
Steps that come after make of an error another one, so it is also measured what becomes of it by the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from toolchain.accuracy.eager import EagerPipeline
from toolchain.formats.schedule import Step
from toolchain.planning.step_search import Numbers, StepErrors

GROWTH_EVERY: Final = 3
"""The growth of errors is measured at every third step, and interpolated between: it takes all the steps after."""


@dataclass(frozen=True)
class MeasuredSteps:
    """The errors of the steps of a video as they are made, and how many times as large each is at the end ``[n]``."""

    errors: StepErrors
    growth: Numbers

    @property
    def at_the_end(self) -> StepErrors:
        """The errors as they are when all steps are done, to first order."""
        own = self.errors
        return StepErrors(own.reused * self.growth, own.alone * self.growth, own.kept * self.growth)


@dataclass(frozen=True)
class _Call:
    """A step: the latents that went in, and the halves ``[1, C, T, H, W]`` that came out."""

    step: Step
    latents: torch.Tensor
    conditional: torch.Tensor
    unconditional: torch.Tensor

    def velocity(self, guidance: float) -> torch.Tensor:
        return self.unconditional + guidance * (self.conditional - self.unconditional)

    def after(self, guidance: float) -> torch.Tensor:
        """The latents after the step."""
        return self.latents + self.velocity(guidance) * self.step.dt


@torch.no_grad()
def measure_steps(pipeline: EagerPipeline, y: torch.Tensor, mask: torch.Tensor, seed: int) -> MeasuredSteps:
    """The errors of the steps of one video.

    Beside the models it holds what one step's range added and, for every step, four times the latents; see
    :func:`calls_to_measure` for how many calls it takes.

    Args:
        pipeline: its sampler names the one range; where steps of it leave something out, all is computed instead.
        y, mask: the prompt, as :meth:`EagerPipeline.encode` gives it.
    """
    return _Video(pipeline, y, mask, seed).measured()


def calls_to_measure(steps: int) -> int:
    """How many calls of the denoiser :func:`measure_steps` takes, beside ``steps``² / 2 without the range."""
    return 2 * steps + sum(steps - j + 1 for j in _growing(steps))


def _growing(steps: int) -> range:
    """The steps at which the growth of errors is measured."""
    return range(1, steps, GROWTH_EVERY)


class _Video:
    """The whole run of one video, and what else its steps could have made."""

    def __init__(self, pipeline: EagerPipeline, y: torch.Tensor, mask: torch.Tensor, seed: int) -> None:
        self._denoiser, self._guidance = pipeline.denoiser(y, mask), pipeline.recipe.sampler.guidance
        (self._range,) = pipeline.ranges
        self._channels = pipeline.geometry.latent_channels
        self._whole: list[_Call] = []
        z = pipeline.noise(seed)
        for step in pipeline.whole_steps:
            self._whole.append(self._call(step, z))
            z = self._whole[-1].after(self._guidance)
        self._end = z

    def _call(self, step: Step, z: torch.Tensor) -> _Call:
        halves = self._denoiser(torch.cat((z, z)), step, None)[:, : self._channels]
        return _Call(step, z, halves[:1], halves[1:])

    def _reusing(self, j: int) -> _Call:
        """Step j on the whole run's latents, with what the range added when it was last computed."""
        return self._call(replace(self._whole[j].step, reuse=self._range), self._whole[j].latents)

    def _compute(self, j: int) -> None:
        """Compute the range as step j does."""
        self._call(self._whole[j].step, self._whole[j].latents)

    def measured(self) -> MeasuredSteps:
        whole, guidance, n = self._whole, self._guidance, len(self._whole)
        differences = torch.stack([(w.conditional - w.unconditional).flatten() for w in whole])
        reused, alone, kept = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n, n))
        for a in range(n):
            self._compute(a)
            for j in range(a, n):
                true, made = whole[j], whole[j] if j == a else self._reusing(j)
                velocity = true.velocity(guidance)
                reused[a, j] = _change(true.step, made.velocity(guidance) - velocity)
                off = made.conditional - velocity
                alone[a, j] = _change(true.step, off)
                for b, difference in enumerate(differences[:j]):
                    kept[a, b, j] = _change(true.step, off.flatten() + (guidance - 1.0) * difference)
        return MeasuredSteps(StepErrors(reused, alone, kept), self._growth())

    def _growth(self) -> Numbers:
        n = len(self._whole)
        at = list(_growing(n))
        if not at:
            return np.ones(n)
        return np.interp(np.arange(n), at, [self._growth_at(j) for j in at])

    def _growth_at(self, j: int) -> float:
        """How many times as large the error of a step is at the end that reuses the range of the one before."""
        self._compute(j - 1)
        z = self._reusing(j).after(self._guidance)
        first = float((z - self._whole[j].after(self._guidance)).norm())
        for later in self._whole[j + 1 :]:
            z = self._call(later.step, z).after(self._guidance)
        return float((z - self._end).norm()) / first if first else 1.0


def _change(step: Step, off: torch.Tensor) -> float:
    """How far a step leads elsewhere with a velocity that is so far off."""
    return abs(step.dt) * float(off.square().mean().sqrt())


def mean_steps(each: Sequence[MeasuredSteps]) -> MeasuredSteps:
    """What was measured on several videos of the same steps, averaged."""
    tables = zip(*((m.errors.reused, m.errors.alone, m.errors.kept, m.growth) for m in each), strict=True)
    *errors, growth = (np.mean(np.stack(own), axis=0) for own in tables)
    return MeasuredSteps(StepErrors(*errors), growth)
