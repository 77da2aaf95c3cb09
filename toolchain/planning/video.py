"""A recipe's video as a run on a device: the work of its blocks, what crosses between them, and the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from toolchain.errors import RecipeError
from toolchain.formats.calls import rounds
from toolchain.formats.device import Device
from toolchain.formats.loading import Times
from toolchain.formats.manifest import Stage
from toolchain.formats.schedule import BASE
from toolchain.formats.times import TimesFile
from toolchain.ir.blocks import Block
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.target import distinct_functions
from toolchain.planning.cost import compute_seconds, load_seconds
from toolchain.planning.loading.predict import Predicted, predict
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.whole import Function, Part, retimed, whole_run

if TYPE_CHECKING:
    from toolchain.planning.plan import ComponentPlan, Plan
    from toolchain.planning.resolve import ResolvedBuild

PIXEL_DTYPE = "float32"
"""Frames between the stages of decoding."""
LATENTS_DTYPE = "float32"
"""What a player denoises in."""


def predict_video(planned: Plan, device: Device, budget_bytes: int | None, measured: TimesFile | None) -> Predicted:
    """Plan and predict the loading of a recipe's video.

    Args:
        device: says how long things take, unless they were ``measured``.

    Raises:
        RecipeError: the budget is too small, or the device has no throughput for a precision.
        BundleError: what was measured is of another bundle.
    """
    if measured is None:
        times = Times(kind="device", name=device.name, sha256=device.sha256)
        return predict(video_run(planned, device), budget_bytes, device.overlap_loss.value, times)
    structures = {f"{c.name}/{b.name}": b.structure() for c in planned.components.values() for b in c.blocks}
    run = retimed(video_run(planned, None), structures, measured)
    return predict(run, budget_bytes, measured.times.overlap_loss, measured.source)


def video_run(planned: Plan, device: Device | None) -> Run:
    """The run of a recipe's video; without a device nothing takes any time.

    Raises:
        RecipeError: the device has no throughput for a precision.
    """
    build = planned.resolved
    stages = decoding_stages(build)
    parts = {name: [_part(c, b, device) for b in c.blocks] for name, c in planned.components.items()}
    beside: dict[tuple[str, str], int] = {("vae", s.rate): _frames_bytes(planned.components["vae"], s) for s in stages}
    order = rounds(planned.components, planned.sampling.calls(_difference_bytes(build)), stages)
    return whole_run(parts, order, beside)


def decoding_stages(build: ResolvedBuild) -> Sequence[Stage]:
    """The stages from latents to pixels; none without a VAE.

    Raises:
        RecipeError: they cannot be as the recipe asks for.
    """
    vae = build.recipe.vae
    if vae is None:
        return ()
    stages = build.family.stages(build.recipe, build.configs)
    if vae.tiles is not None and all(s.tiles is None for s in stages):
        raise RecipeError(f"vae.tiles: model '{build.recipe.model}' does not decode in tiles; leave it out")
    return stages


def _difference_bytes(build: ResolvedBuild) -> int:
    """Bytes of the difference of the halves of guidance, where a player keeps one: of one video's latents."""
    if build.recipe.sampler.difference == "none":
        return 0
    g = build.family.geometry(build.recipe, build.configs)
    return g.latent_channels * g.latent_frames * g.latent_height * g.latent_width * DTYPES[LATENTS_DTYPE].bytes


def _part(component: ComponentPlan, block: Block, device: Device | None) -> Part:
    memory = component.memory[block.name]
    precision = component.target.arithmetic(block)

    def seconds(function: str) -> float:
        work = memory.works[function]
        return compute_seconds(device, work.flops, work.moved_bytes, precision) if device else 0.0

    functions = {
        f: Function(seconds(f), memory.peaks[f].bytes + memory.waiting, memory.left) for f in distinct_functions(block)
    }
    load_s = load_seconds(device, memory.weights) if device else 0.0
    return Part(f"{component.name}/{block.name}", block.rate, memory.weights, load_s, functions, BASE)


def _frames_bytes(component: ComponentPlan, stage: Stage) -> int:
    """Bytes of all frames that a stage of decoding takes and gives, which a player keeps beside the blocks."""
    return sum(_frame_numbers(component, stage)) * DTYPES[PIXEL_DTYPE].bytes


def _frame_numbers(component: ComponentPlan, stage: Stage) -> Iterator[int]:
    own = [b for b in component.blocks if b.rate == stage.rate]
    time = 2 if stage.layout == "clip" else 0
    taken = next(p for b in own for p in b.inputs if b.sources[p.name].startswith("inputs."))
    given = next(p for b in own for p in b.outputs if p.name in b.results)
    tiles = stage.tiles
    for port, frames in ((taken, sum(p.takes for p in stage.pieces)), (given, sum(p.gives for p in stage.pieces))):
        numbers = prod((*port.shape[:time], *port.shape[time + 1 :])) * frames
        yield numbers if tiles is None else numbers * prod(tiles.frame) // (tiles.height * tiles.width)
