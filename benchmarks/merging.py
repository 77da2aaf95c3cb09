"""What options of token-merge are worth, on the shipped miniature: the same prompts and seeds under each.

    python benchmarks/merging.py [--prompts 40] [--merged 10] [--scale 1.0]

Everything is the eager pipeline's in float32; prompts and figures are those of ``benchmarks/quality.py``. PSNR and SSIM
are against the same seed's video without merging. ``--scale`` is the sampler's ``transform_scale``: at the miniature's
size its ratio is 0.28, where steps are crowded near the video; 6 gives it that of the shipped iPhone recipe.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import toolchain
from benchmarks.quality import COLUMNS, Video, figures, prompts
from toolchain.accuracy.eager import EagerPipeline
from toolchain.formats.recipe_file import find_recipe

OPTIONS = {
    "none": None,
    "as published": "",
    "unmerge: linear": "unmerge: linear",
    "pairs: alternating": "pairs: alternating",
    "linear, alternating": "unmerge: linear, pairs: alternating",
    "self-attention alone": "where: [self_attention]",
    "cross-attention alone": "where: [cross_attention]",
    "layers 0 and 1": "layers: {last: 1}",
    "layers 2 and 3": "layers: {first: 2}",
    "layers 2 and 3, linear": "layers: {first: 2}, unmerge: linear",
    "cross-attention, linear": "where: [cross_attention], unmerge: linear",
}


def pipeline(options: str | None, merged: int, scale: float) -> EagerPipeline:
    """The miniature with its first steps merged so."""
    steps = 0 if options is None else merged
    sets = [f"sampler.merged_steps={steps}", "sampler.leap=null", f"sampler.transform_scale={scale}"]
    if options:
        sets.append(f"transformer.passes=[{{token-merge: {{{options}}}}}, partition]")
    return EagerPipeline(toolchain.load_recipe("tiny", sets), find_recipe("tiny").parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--merged", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    scenes = prompts(args.prompts)
    print(f"{args.prompts} prompts, {args.merged} of 30 steps merged, transform_scale {args.scale:g}")
    print(f"| token-merge | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (len(COLUMNS) + 1))
    full: list[Video] = []
    for name, options in OPTIONS.items():
        own, made = pipeline(options, args.merged, args.scale), []
        for seed, scene in enumerate(scenes):
            began = time.perf_counter()
            frames = own.video(scene.prompt(), seed)
            made.append(Video(frames, 30, time.perf_counter() - began))
        full = full or made
        found = figures(made, scenes, full)
        print(f"| {name} | {' | '.join(form.format(found[c]) for c, form in COLUMNS.items())} |", flush=True)


if __name__ == "__main__":
    main()
