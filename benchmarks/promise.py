"""What `sora-compile tune` promises, and what its recipe then plays: on the shipped miniature, on other prompts.

    python benchmarks/promise.py [--quality 40,45,35] [--tuning 16] [--prompts 24] [--scale 6] [--target onnx]

Searches on prompts that the model was trained on, writes the recipe of each goal, compiles it, and plays held-out
prompts, those of ``benchmarks/quality.py``, from the bundle alone. What is played is held against the full schedule's
video of the same seed, made in PyTorch in float32. "Mean" and "promised" are of the tuning prompts, "played" is of the
held-out ones: the mean, its standard error, and the least.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import toolchain
from benchmarks.quality import prompts
from toolchain.accuracy.eager import EagerPipeline
from toolchain.accuracy.golden_video import psnr
from toolchain.build.tuning import Tuned
from toolchain.formats.recipe_file import find_recipe
from toolchain.planning.schedule_costs import schedule_name
from toolchain.player.video import to_bytes
from toolchain.ui.tuning import tuned_file
from training.grammar import split

COLUMNS = ("goal", "chosen", "speed-up", "mean", "promised", "played", "standard error", "worst", "played - promised")


def played(tuned: Tuned, folder: Path, full: list[tuple[str, torch.Tensor]]) -> list[float]:
    """PSNR of what the written recipe's bundle plays, against the full schedule's pixels of each prompt."""
    path = folder / "tuned.yaml"
    path.write_text(tuned_file(tuned, find_recipe("tiny").parent, path))
    bundle = toolchain.compile_recipe(toolchain.load_recipe(path), folder / "bundle", base=folder)
    player = toolchain.Player(bundle)
    return [psnr(to_bytes(player.video(prompt, seed)), pixels) for seed, (prompt, pixels) in enumerate(full)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", default="40,45,35", help="goals in dB")
    parser.add_argument("--tuning", type=int, default=16, help="prompts to search on")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts")
    parser.add_argument("--scale", type=float, default=6.0, help="sampler.transform_scale")
    parser.add_argument("--points", type=int, default=12, help="of the search, as for the command")
    parser.add_argument("--target", default="onnx")
    args = parser.parse_args()
    known = split()[0]
    random.Random(0).shuffle(known)
    recipe = toolchain.load_recipe("tiny", [f"sampler.transform_scale={args.scale}", f"target={args.target}"])
    texts = [s.prompt() for s in known[: args.tuning]]
    full: list[tuple[str, torch.Tensor]] = []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for goal in map(float, args.quality.split(",")):
        tuned = toolchain.tune(recipe, prompts=texts, quality_db=goal, points=args.points)
        chosen = tuned.chosen
        assert chosen is not None  # there is a goal
        if not full:
            pipeline = EagerPipeline(recipe).under(tuned.full.sampler)
            held_out = [s.prompt() for s in prompts(args.prompts)]
            full = [(p, to_bytes(pipeline.video(p, seed))) for seed, p in enumerate(held_out)]
        with tempfile.TemporaryDirectory() as folder:
            each = played(tuned, Path(folder), full)
        mean, error = statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5
        numbers = chosen.psnr_db, chosen.promised_db, mean, error, min(each), mean - chosen.promised_db
        cells = [f"{goal:g}", schedule_name(chosen.sampler), f"{tuned.full.seconds / chosen.seconds:.2f}x"]
        print(f"| {' | '.join([*cells, *(f'{n:.2f}' for n in numbers)])} |", flush=True)


if __name__ == "__main__":
    main()
