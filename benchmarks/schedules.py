"""Schedules that are searched for against those that are guessed, on the shipped miniature model.

    python benchmarks/schedules.py [--prompts 40] [--seeds 2] [--tuning 4] [--scales 6,1] [--device DEVICE]

Searches on prompts that the model was trained on (`sora-compile tune`), and makes videos of held-out ones, those of
``benchmarks/quality.py``, with each seed. All in PyTorch in float32: a bundle plays the same schedule to 80 dB or so.
Times are the planner's, of a whole video, on a device whose calls and loads have no overhead: the miniature's blocks
are so small that overheads would make a step that reuses them cost a fifth of one that does not, where at Open-Sora's
sizes it costs next to nothing (``--device`` names another). PSNR is against the same seed's full schedule; what a
video shows is read off its frames.

At 64 x 64 the official transform of timesteps has the ratio 0.28, which flatters everything that is left out late. At
``--scales 6`` it has that of the shipped iPhone recipe, 1.68: read that one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

import toolchain
from benchmarks.quality import prompts
from toolchain.accuracy.eager import EagerPipeline
from toolchain.accuracy.golden_video import psnr
from toolchain.build.tuning import Tuned, choose
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.models.open_sora_v1_2.family import OpenSoraV12
from toolchain.planning.schedule_costs import ScheduleCosts, schedule_name
from toolchain.player.video import to_bytes
from toolchain.ui.tuning import steps_text
from training.grammar import Scene, split
from training.judge import judge

ROOT = Path(__file__).parents[1]
SPEED = 1.5
"""How many times as fast as the full schedule the last rows are, at least."""
FEWER = (24, 20, 18, 16, 15, 14, 12, 10)
"""Numbers of steps, for what simply making fewer gives."""


@dataclass
class Row:
    """A setting, what is predicted of it, and what its videos came to."""

    name: str
    sampler: SamplerRecipe
    seconds: float
    db: list[float]
    right: list[bool]


def settings(recipe: Recipe, tuned: Tuned) -> list[Row]:
    """The full schedule, the leap of the recipe, and at the same predicted time, and at 1.5 times the speed, others."""
    full = tuned.full.sampler
    costs = ScheduleCosts(toolchain.plan(recipe), None)

    def row(name: str, sampler: SamplerRecipe) -> Row:
        return Row(name, sampler, costs.seconds(sampler), [], [])

    def of(**changes: Any) -> SamplerRecipe:
        return SamplerRecipe.model_validate(full.model_dump() | changes)

    def within(seconds: float, choices: Sequence[SamplerRecipe]) -> SamplerRecipe:
        return next(s for s in choices if costs.seconds(s) <= seconds * (1 + 1e-6))

    def searched(seconds: float) -> SamplerRecipe:
        found = choose(tuned.front, seconds * (1 + 1e-6), None)
        assert found is not None
        return found.sampler

    leap, fast = costs.seconds(of(leap=15)), costs.seconds(full) / SPEED
    fewer = [of(steps=n) for n in FEWER]
    leaps = [of(leap=n) for n in range(29, 0, -1)]
    return [
        row("full", full),
        row("leap after 15", of(leap=15)),
        row("fewer steps, time of that leap", within(leap, fewer)),
        row("searched, time of that leap", searched(leap)),
        row(f"leap, {SPEED}x", within(fast, leaps)),
        row(f"fewer steps, {SPEED}x", within(fast, fewer)),
        row(f"searched, {SPEED}x", searched(fast)),
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
                full = to_bytes(frames) if row is rows[0] else full
                row.db.append(psnr(to_bytes(frames), full))
                row.right.append(all(judge(frames.transpose(0, 1)).correct(scene).values()))


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
    parser.add_argument("--scales", default="6,1", help="values of sampler.transform_scale")
    parser.add_argument("--device", help="the name or file of a profile; one without overheads if absent")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args, args.device or str(without_overhead(Path(folder))))


def run(args: argparse.Namespace, device: str) -> None:
    """Print the table."""
    known = split()[0]
    random.Random(0).shuffle(known)
    print("| ratio | setting | schedule | predicted, s | speed-up | PSNR, dB | worst | all right |")
    print("|---|---|---|---|---|---|---|---|")
    for scale in map(float, args.scales.split(",")):
        recipe = toolchain.load_recipe("tiny", [f"sampler.transform_scale={scale}", f"device={device}"])
        ratio = OpenSoraV12().transform_ratio(recipe)
        leap_s = toolchain.plan(recipe).loading.timeline.total_s  # the recipe's own schedule is the leap after 15
        tuned = toolchain.tune(recipe, prompts=[s.prompt() for s in known[: args.tuning]], latency_s=leap_s)
        rows = settings(recipe, tuned)
        fill(rows, EagerPipeline(recipe), prompts(args.prompts), args.seeds)
        for row in rows:
            mean, worst = sum(row.db) / len(row.db), min(row.db)
            decibels = ["", ""] if row is rows[0] else [f"{mean:.1f}", f"{worst:.1f}"]
            right = f"{sum(row.right) / len(row.right):.1%}"
            speed = f"{rows[0].seconds / row.seconds:.2f}x"
            schedule = schedule_name(row.sampler)
            cells = [f"{ratio:.2f}", row.name, schedule, f"{row.seconds:.4g}", speed, *decibels, right]
            print(f"| {' | '.join(cells)} |", flush=True)
        for row in rows:
            print(f"{row.name}: {steps_text(row.sampler)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
