"""The sampler's numbers: timesteps against one another and against every step's dt, predictions against latents."""

from __future__ import annotations

from typing import Final

from toolchain.formats.consistency.inputs import HALVES
from toolchain.formats.consistency.shapes import result, shape_in
from toolchain.formats.manifest import Manifest

TOLERANCE: Final = 1e-5
"""Of a step's ``dt``, which float32 rounds, and of the first timestep."""


def check_sampling(manifest: Manifest) -> None:
    """Hold timesteps, steps and predictions against one another.

    Raises:
        ValueError: names the step or the output.
    """
    sampler = manifest.sampler
    if not sampler.steps:
        raise ValueError("sampler.steps: there is none")
    ends = [*(step.timestep for step in sampler.steps[1:]), 0.0]
    for i, (step, end) in enumerate(zip(sampler.steps, ends, strict=True)):
        where = f"sampler.steps.{i}"
        if not end < step.timestep <= sampler.time_scale * (1 + TOLERANCE):
            raise ValueError(
                f"{where}.timestep: {step.timestep} is not between the next one, {end}, and {sampler.time_scale}"
            )
        expected = (step.timestep - end) / sampler.time_scale
        if abs(step.dt - expected) > TOLERANCE:
            raise ValueError(f"{where}.dt: {step.dt}, but by the timesteps it is {expected:g}")
    if "transformer" in manifest.components:
        _check_predictions(manifest)


def _check_predictions(manifest: Manifest) -> None:
    g, sampler, denoiser = manifest.geometry, manifest.sampler, manifest.components["transformer"]
    outputs = [o for o in denoiser.results("prediction") if o.rate == sampler.each]
    if len(outputs) != 1:
        raise ValueError(
            f"components.transformer.outputs: {len(outputs)} predictions at rate '{sampler.each}'; needs 1"
        )
    block, port = result(denoiser, outputs[0].source)
    channels, sizes = g.latent_channels, [g.latent_frames, g.latent_height, g.latent_width]
    for step in sampler.steps:
        shape = shape_in(denoiser, block, port, step.function)
        rows = 1 if step.guidance == "conditional" else HALVES
        if shape not in ([rows, channels, *sizes], [rows, 2 * channels, *sizes]):
            raise ValueError(
                f"components.transformer.outputs: '{step.function}' predicts {shape}, but by geometry latents are "
                f"{[rows, channels, *sizes]}"
            )
