"""Schedules that are searched for against those that are guessed, on the shipped miniature model.

    python benchmarks/schedules.py [--prompts 40] [--seeds 2] [--tuning 4] [--points 12] [--scales 6,1]

Searches on prompts that the model was trained on (`sora-compile tune`), and makes videos of held-out ones, those of
``benchmarks/quality.py``, with each seed. All in PyTorch in float32: a bundle plays the same schedule to 80 dB or so.
Times are the planner's, of a whole video, on a device whose calls and loads have no overhead: the miniature's blocks
are so small that overheads would make a step that reuses them cost a fifth of one that does not, where at Open-Sora's
sizes it costs next to nothing (``--device`` names another). PSNR is against the same seed's full schedule; what a
video shows is read off its frames. "Still" is how much the outermost pixels, which no shape covers, change from frame
to frame, in levels of 255. "Searched" steps may reuse blocks; with conditional steps, they may leave out half of the
guidance, too.

At 64 x 64 the official transform of timesteps has the ratio 0.28, which flatters everything that is left out late. At
``--scales 6`` it has that of the shipped iPhone recipe, 1.68: read that one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

import toolchain
from benchmarks.quality import prompts, read_off
from toolchain.accuracy.eager import EagerPipeline
from toolchain.build.tuning import Tuned, choose
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.models.open_sora_v1_2.family import OpenSoraV12
from toolchain.planning.schedule_costs import ScheduleCosts, schedule_name
from toolchain.ui.tuning import steps_text
from training.grammar import Scene, split

ROOT = Path(__file__).parents[1]
SPEED = 1.5
"""How many times as fast as the full schedule the last rows are, at least."""
SEARCHES: Mapping[str, Sequence[str]] = {
    "searched": (),
    "searched with conditional steps": ("transformer.passes=[token-merge, guidance-split, partition]",),
}
"""What is searched for, by changes of the recipe."""
COLUMNS = (
    "ratio",
    "setting",
    "schedule",
    "predicted, s",
    "speed-up",
    "PSNR, dB",
    "worst",
    "SSIM",
    "all right",
    "speed right",
    "still",
)
FEWER = (24, 20, 18, 16, 15, 14, 12, 10)
"""Numbers of steps, for what simply making fewer gives."""


@dataclass
class Row:
    """A setting, what is predicted of it, and what was read off its videos."""

    name: str
    sampler: SamplerRecipe
    seconds: float
    found: list[dict[str, float]]

    def mean(self, column: str) -> float:
        """Over all videos."""
        return sum(f[column] for f in self.found) / len(self.found)


def settings(recipe: Recipe, tuned: Mapping[str, Tuned]) -> list[Row]:
    """The full schedule, the leap of the recipe, and at the same predicted time, and at 1.5 times the speed, others.

    Args:
        recipe: its denoiser can do all that is searched for.
        tuned: what searches found, by their names.
    """
    full = next(iter(tuned.values())).full.sampler
    costs = ScheduleCosts(toolchain.plan(recipe), None)

    def row(name: str, sampler: SamplerRecipe) -> Row:
        return Row(name, sampler, costs.seconds(sampler), [])

    def of(**changes: Any) -> SamplerRecipe:
        return SamplerRecipe.model_validate(full.model_dump() | changes)

    def within(seconds: float, choices: Sequence[SamplerRecipe]) -> SamplerRecipe:
        return next(s for s in choices if costs.seconds(s) <= seconds * (1 + 1e-6))

    def searched(seconds: float, name: str) -> list[Row]:
        found = {k: choose(t.front, seconds * (1 + 1e-6), None) for k, t in tuned.items()}
        return [row(f"{k}, {name}", t.sampler) for k, t in found.items() if t is not None]

    leap, fast = costs.seconds(of(leap=15)), costs.seconds(full) / SPEED
    fewer = [of(steps=n) for n in FEWER]
    leaps = [of(leap=n) for n in range(29, 0, -1)]
    return [
        row("full", full),
        row("leap after 15", of(leap=15)),
        row("fewer steps, time of that leap", within(leap, fewer)),
        *searched(leap, "time of that leap"),
        row(f"leap, {SPEED}x", within(fast, leaps)),
        row(f"fewer steps, {SPEED}x", within(fast, fewer)),
        *searched(fast, f"{SPEED}x"),
    ]


def fill(rows: Sequence[Row], pipeline: EagerPipeline, scenes: Sequence[Scene], seeds: int) -> None:
    """Make every scene's videos in every setting; the first one is what others are held against."""
    pipelines = [pipeline.under(row.sampler) for row in rows]
    for number, scene in enumerate(scenes):
        encoded = pipeline.encode(scene.prompt())
        for seed in range(seeds):
            full = torch.empty(0)
            for row, own in zip(rows, pipelines, strict=True):
                frames = own.decode(own.denoise(*encoded, number * seeds + seed))
                full = frames if row is rows[0] else full
                row.found.append(read_off(frames, scene, full))


def without_overhead(folder: Path) -> Path:
    """The shipped profile of an unspecified device, whose calls and loads have no overhead."""
    profile = yaml.safe_load((ROOT / "recipes/devices/unspecified.yaml").read_text())
    for key in ("call_overhead_s", "load_overhead_s"):
        profile[key] |= {"value": 0.0, "source": "left out, as at Open-Sora's sizes it hardly counts"}
    path = folder / "no-overhead.yaml"
    path.write_text(yaml.safe_dump(profile | {"name": "no-overhead"}))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tuning", type=int, default=4, help="prompts to search on")
    parser.add_argument("--points", type=int, default=12, help="of each search, as for the command")
    parser.add_argument("--scales", default="6,1", help="values of sampler.transform_scale")
    parser.add_argument("--device", help="the name or file of a profile; one without overheads if absent")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args, args.device or str(without_overhead(Path(folder))))


def run(args: argparse.Namespace, device: str) -> None:
    """Print the table."""
    known = split()[0]
    random.Random(0).shuffle(known)
    print(
        "| ratio | setting | schedule | predicted, s | speed-up | PSNR, dB | worst | SSIM | all right | speed | still |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for scale in map(float, args.scales.split(",")):
        own = [f"sampler.transform_scale={scale}", f"device={device}"]
        recipes = {name: toolchain.load_recipe("tiny", [*own, *more]) for name, more in SEARCHES.items()}
        recipe = list(recipes.values())[-1]
        ratio = OpenSoraV12().transform_ratio(recipe)
        leap_s = toolchain.plan(recipe).loading.timeline.total_s  # the recipe's own schedule is the leap after 15
        texts = [s.prompt() for s in known[: args.tuning]]
        goal: dict[str, Any] = {"prompts": texts, "points": args.points, "latency_s": leap_s}
        tuned = {name: toolchain.tune(r, **goal) for name, r in recipes.items()}
        rows = settings(recipe, tuned)
        fill(rows, EagerPipeline(recipe), prompts(args.prompts), args.seeds)
        for row in rows:
            near = [f"{row.mean('psnr'):.1f}", f"{min(f['psnr'] for f in row.found):.1f}", f"{row.mean('ssim'):.3f}"]
            near = ["", "", ""] if row is rows[0] else near
            shown = [f"{row.mean('all'):.1%}", f"{row.mean('speed'):.1%}", f"{row.mean('still'):.2f}"]
            faster = f"{rows[0].seconds / row.seconds:.2f}x"
            cells = [f"{ratio:.2f}", row.name, schedule_name(row.sampler), f"{row.seconds:.4g}", faster, *near, *shown]
            print(f"| {' | '.join(cells)} |", flush=True)
        for row in rows:
            print(f"{row.name}: {steps_text(row.sampler)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
