"""What decoding in tiles costs in quality, and saves in memory: the miniature eagerly, the full-size VAE as planned.

    python benchmarks/tiles.py [--prompts 12] [--plan-only]

Quality: the shipped miniature at 64 x 64, eager in float32; the same latents decoded whole and in tiles, prompts and
figures as in ``benchmarks/quality.py``. "worst" is the least PSNR of all prompts, "seam" the mean absolute step between
pixels on both sides of a line where a tile begins, over the same of whole frames. "whole norms" is the PSNR if group
norms take mean and variance from whole frames, which no bundle does: what is left is of attention and of borders.

Memory: of the spatial decoder, as the planner predicts it, nothing is lowered: what its blocks hold beside their
weights at most; the same with whole frames before and after the decoder, which wait beside any call; and how many
pixels are computed for one of a frame. Last for each size, the same of the temporal decoder, which takes no tiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import toolchain
from benchmarks.quality import Video, figures, prompts
from toolchain.accuracy.eager import EagerPipeline
from toolchain.formats.recipe_file import find_recipe
from toolchain.formats.tiles import Tiles, in_tiles, tiles_of
from toolchain.models.open_sora_v1_2 import vae_leaves
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig, as_frames
from toolchain.planning.plan import Plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.planning.video import decoding_stages, video_run

FULL = "open-sora-v1.2-iphone-15-pro"
QUALITY = [(32, 0), (32, 8), (32, 16), (48, 0), (48, 16), (48, 32), (56, 48)]
"""Sizes of square tiles and their overlap, in pixels, of frames of 64 x 64."""
MEMORY = [
    ("tiny", 64, ((1, None), (1, (48, 16)), (1, (32, 8)))),
    (FULL, 192, ((4, None), (1, None), (4, (128, 32)), (4, (96, 32)), (4, (64, 16)), (1, (96, 32)))),
    (FULL, 512, ((4, None), (1, None), (4, (256, 64)), (4, (192, 64)), (4, (128, 32)), (1, (256, 64)), (1, (128, 32)))),
]
"""Recipes, sides of the video, and frames at once with tiles."""


def options(size: tuple[int, int] | None) -> list[str]:
    """Of a recipe, for square tiles with an overlap."""
    return [] if size is None else [f"vae.tiles={{height: {size[0]}, width: {size[0]}, overlap: {size[1]}}}"]


def name(size: tuple[int, int] | None) -> str:
    return "whole frames" if size is None else f"{size[0]}², overlap {size[1]}"


def pipeline(size: tuple[int, int] | None) -> EagerPipeline:
    """The miniature, decoding so."""
    return EagerPipeline(toolchain.load_recipe("tiny", options(size)), find_recipe("tiny").parent)


def whole_norms(vae: OpenSoraVAE, tiles: Tiles, x_z: torch.Tensor) -> torch.Tensor:
    """``x_z`` ``[n, C, h, w]`` decoded in tiles, every group norm with the mean and variance of whole frames."""
    kept: dict[torch.nn.GroupNorm, tuple[torch.Tensor, torch.Tensor]] = {}

    def recorded(x: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
        groups = x.reshape(x.shape[0], norm.num_groups, -1)
        kept[norm] = (groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False))
        return normed(x, norm)

    def normed(x: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
        mean, variance = kept[norm]
        groups = (x.reshape(x.shape[0], norm.num_groups, -1) - mean) / (variance + norm.eps).sqrt()
        flat = groups.reshape(x.shape[0], x.shape[1], -1)
        return (flat * norm.weight[:, None] + norm.bias[:, None]).reshape(x.shape)

    with mock.patch.object(vae_leaves, "group_norm", recorded):
        vae.spatial_vae.decode(x_z)
    with mock.patch.object(vae_leaves, "group_norm", normed):
        return in_tiles(tiles, x_z, vae.spatial_vae.decode)


def load_vae() -> OpenSoraVAE:
    """The miniature's."""
    folder = find_recipe("tiny").parent / "tiny/vae"
    vae = OpenSoraVAE(OpenSoraVAEConfig.from_json(json.loads((folder / "config.json").read_text())))
    vae.load_state_dict(load_file(folder / "model.safetensors"))
    return vae.eval().requires_grad_(False)


def seam(frames: torch.Tensor, whole: torch.Tensor, size: tuple[int, int]) -> float:
    """How much pixels differ across the lines where tiles begin or end, over how much they do in whole frames."""
    side, starts = frames.shape[-1], range(0, frames.shape[-1] - size[0], size[0] - size[1])
    lines = sorted({x for s in (*starts, side - size[0]) for x in (s, s + size[0])} - {0, side})
    across = [
        sum(float(v.diff(dim=d).abs().index_select(d, at).mean()) for d in (2, 3))
        for v, at in ((frames, torch.tensor(lines) - 1), (whole, torch.tensor(lines) - 1))
    ]
    return across[0] / across[1]


def quality(count: int) -> None:
    scenes = prompts(count)
    own = pipeline(None)
    latents = [own.denoise(*own.encode(s.prompt()), seed) for seed, s in enumerate(scenes)]
    whole = [Video(own.decode(z), 0, 0.0) for z in latents]
    vae = load_vae()
    frames = [as_frames(vae.decode_temporal(z, len(v.frames))) for z, v in zip(latents, whole, strict=True)]
    print(f"{count} prompts")
    print("| tiles | PSNR, dB | worst | SSIM | all right | seam | whole norms |\n|---|---|---|---|---|---|---|")
    for size in (None, *QUALITY):
        made = whole if size is None else [Video(pipe.decode(z), 0, 0.0) for pipe in [pipeline(size)] for z in latents]
        f = figures(made, scenes, whole)
        if size is None:
            print(f"| {name(size)} | | | | {f['all']:.0%} | 1.00 | |", flush=True)
            continue
        seams = [seam(a.frames, b.frames, size) for a, b in zip(made, whole, strict=True)]
        side, px = size
        cut = tiles_of((8, 8), height_px=side, width_px=side, overlap_px=px, factor=8)
        normed = [Video(whole_norms(vae, cut, x), 0, 0.0) for x in frames]
        print(
            f"| {name(size)} | {f['psnr']:.1f} | {f['worst']:.1f} | {f['ssim']:.3f} | {f['all']:.0%} "
            f"| {sum(seams) / len(seams):.2f} | {figures(normed, scenes, whole)['psnr']:.1f} |",
            flush=True,
        )


def needs(planned: Plan, rate: str) -> tuple[int, int, int]:
    """Of the decoder's blocks of a rate: rounds, bytes beside weights at most, and these with whole frames."""
    blocks = [b for b in planned.components["vae"].blocks if b.rate == rate]
    calls = [c for c in video_run(planned, None).calls() if c.block in {f"vae/{b.name}" for b in blocks}]
    own = max(planned.components["vae"].memory[b.name].activations for b in blocks)
    return len(calls) // len(blocks), own, max(c.activation_bytes + c.live_bytes for c in calls)


def memory() -> None:
    print("| video | frames at once | tiles | calls | decoder, MB | with frames, MB | pixels computed |")
    print("|---|---|---|---|---|---|---|")
    for recipe_name, side, sizes in MEMORY:
        path = find_recipe(recipe_name)
        for together, size in sizes:
            sets = [f"video.height={side}", f"video.width={side}", f"vae.frames_per_call={together}", *options(size)]
            recipe = toolchain.load_recipe(path, sets)
            build = resolve(recipe, path.parent, checkpoints=False)
            planned = plan_resolved(build)
            stage = decoding_stages(build)[-1]
            calls, own, held = needs(planned, stage.rate)
            tiles = stage.tiles or Tiles(height=1, width=1, overlap=0, scale=1, tops=[0], lefts=[0])
            computed = tiles.count * tiles.height * tiles.width / (tiles.frame[0] * tiles.frame[1])
            print(
                f"| {recipe.video.frames} × {side}² | {together} | {name(size)} | {calls} | {own / 1e6:.1f} "
                f"| {held / 1e6:.1f} | {computed:.2f} |",
                flush=True,
            )
        calls, own, held = needs(planned, "chunk")
        print(f"| {recipe.video.frames} × {side}² | | temporal | {calls} | {own / 1e6:.1f} | {held / 1e6:.1f} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--plan-only", action="store_true", help="memory alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.plan_only:
        quality(args.prompts)
    memory()


if __name__ == "__main__":
    main()
