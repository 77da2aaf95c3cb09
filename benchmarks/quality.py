"""What every technique costs in quality, and saves in time, on the shipped miniature model.

    python benchmarks/quality.py [--prompts 40] [--bundle BUNDLE] [--sheet sheet.png] [--curve curve.json]

Compiles the shipped recipe for ExecuTorch (or takes a bundle), then plays the same prompts and seeds under
every setting with the same artifacts: a setting is only a schedule. Prompts are combinations that were
never trained on. Accuracy is read off the frames; PSNR and SSIM are against the same seed's full run.

At 64 × 64 the official timestep transform moves time towards the video (ratio 0.28), which flatters the leap.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

sys.path.insert(0, str(Path(__file__).parents[1]))

import itertools

import toolchain
from toolchain.manifest import Manifest
from toolchain.player.video import to_bytes
from toolchain.schedule import PRESETS, DynamicLeap, StaticLeap
from training.grammar import Scene, split
from training.judge import judge


@dataclass(frozen=True)
class Setting:
    """A schedule: how many first steps run merged, and when to leap."""

    name: str
    merged: int = 0
    leap: StaticLeap | DynamicLeap | None = None


SETTINGS = (
    Setting("full, 30 steps"),
    *(Setting(f"leap after {n}", leap=StaticLeap(after=n)) for n in (5, 10, 15, 20)),
    *(Setting(f"leap, rule '{name}'", leap=rule) for name, rule in PRESETS.items()),
    *(Setting(f"first {n} merged", merged=n) for n in (10, 15, 30)),
    Setting("first 10 merged, leap after 15", merged=10, leap=StaticLeap(after=15)),
)


def with_setting(manifest: Manifest, setting: Setting) -> Manifest:
    """The manifest with another schedule; the player reads nothing else."""
    leap = None if setting.leap is None else setting.leap.resolve(len(manifest.sampler.timesteps))
    sampler = manifest.sampler.model_copy(update={"leap": leap, "merged_steps": setting.merged})
    return manifest.model_copy(update={"sampler": sampler})


@dataclass
class Video:
    """What a setting made of a prompt, and how long the denoising took."""

    frames: torch.Tensor
    calls: int
    seconds: float


def make(bundle: toolchain.Bundle, setting: Setting, scenes: list[Scene]) -> Iterator[Video]:
    """Play every prompt under a setting; the seed is the prompt's index."""
    player = toolchain.Player(dataclasses.replace(bundle, manifest=with_setting(bundle.manifest, setting)))
    for seed, scene in enumerate(scenes):
        y, mask = player.encode(scene.prompt())
        calls, began = 0, time.perf_counter()

        def count(stage: str, done: int, total: int) -> None:
            nonlocal calls
            calls += stage == "denoise" and done < total

        player.progress = count
        latents = player.denoise(y, mask, seed)
        seconds = time.perf_counter() - began
        yield Video(player.decode(latents), calls, seconds)


def figures(videos: list[Video], scenes: list[Scene], full: list[Video]) -> dict[str, float]:
    """Means over the prompts."""
    rows = []
    for video, scene, reference in zip(videos, scenes, full, strict=True):
        right = judge(video.frames.transpose(0, 1)).correct(scene)
        a, b = to_bytes(reference.frames).numpy(), to_bytes(video.frames).numpy()
        same = bool((a == b).all())
        steps = video.frames.diff(dim=0)
        rows.append(
            {k: float(v) for k, v in right.items()}
            | {
                "calls": float(video.calls),
                "seconds": video.seconds,
                "motion": float(steps.abs().mean()),
                "flicker": float(steps.diff(dim=0).abs().mean()),
                "psnr": float("inf") if same else float(peak_signal_noise_ratio(a, b)),
                "ssim": float(structural_similarity(a, b, channel_axis=3)) if not same else 1.0,
            }
        )
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}


def contact_sheet(made: dict[str, list[Video]], path: Path) -> None:
    """One prompt under every setting: a row a setting, every fourth frame."""
    from PIL import Image

    rows = [torch.cat(tuple(to_bytes(v[0].frames)[::4]), dim=1) for v in made.values()]
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def velocity_cosines(bundle: toolchain.Bundle, scenes: list[Scene]) -> list[float]:
    """Mean cosine of consecutive velocities over the steps (figure 4 of arXiv 2502.04363)."""
    player = toolchain.Player(dataclasses.replace(bundle, manifest=with_setting(bundle.manifest, SETTINGS[0])))
    curves = []
    for seed, scene in enumerate(scenes):
        places: list[tuple[torch.Tensor, float]] = []
        y, mask = player.encode(scene.prompt())
        player.denoise(y, mask, seed, on_step=lambda step, z, to=places: to.append((z.flatten(), step.dt)))
        # the first place is after the first step, so the first velocity is that of the second
        v = [(b[0] - a[0]) / b[1] for a, b in itertools.pairwise(places)]
        pairs = itertools.pairwise(v)
        curves.append([float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs])
    return [sum(c) / len(c) for c in zip(*curves, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--bundle", type=Path, help="an ExecuTorch bundle of recipes/tiny.yaml")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first prompt")
    parser.add_argument("--curve", type=Path, help="write the cosines of consecutive velocities")
    args = parser.parse_args()
    scenes = split()[1]
    scenes = (scenes * (args.prompts // len(scenes) + 1))[: args.prompts]
    with tempfile.TemporaryDirectory() as tmp:
        path = args.bundle or toolchain.compile_recipe(toolchain.load_recipe("tiny"), Path(tmp) / "bundle").path
        bundle = toolchain.load_bundle(path)
        made: dict[str, list[Video]] = {}
        columns = ("shape", "colour", "background", "axis", "sign", "psnr", "ssim", "flicker", "motion")
        print(f"| setting | calls | seconds | {' | '.join(columns)} |")
        print("|" + "---|" * (len(columns) + 3))
        for setting in SETTINGS:
            made[setting.name] = list(make(bundle, setting, scenes))
            f = figures(made[setting.name], scenes, made[SETTINGS[0].name])
            numbers = " | ".join(f"{f[c]:.3g}" for c in columns)
            print(f"| {setting.name} | {f['calls']:.1f} | {f['seconds']:.2f} | {numbers} |", flush=True)
        if args.sheet:
            contact_sheet(made, args.sheet)
        if args.curve:
            args.curve.write_text(json.dumps(velocity_cosines(bundle, scenes[:10])))


if __name__ == "__main__":
    main()
