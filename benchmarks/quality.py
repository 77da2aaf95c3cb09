"""What every technique costs in quality, and saves in time, on the shipped miniature model.

    python benchmarks/quality.py [--prompts 40] [--bundle BUNDLE] [--coreml BUNDLE] [--figures FOLDER]

Compiles the shipped recipe for ExecuTorch (or takes a bundle), then plays the same prompts and seeds under
every setting with the same artifacts: a setting is only a schedule. Prompts are combinations that were
never trained on; the first 24 name no size or speed, the others may. What a video shows is read off its frames;
PSNR and SSIM are against the same seed's full run on ExecuTorch. One more row is the full run through the
Core ML bundle in float16, where this machine can run one.

At 64 x 64 the official timestep transform moves time towards the video (ratio 0.28), which flatters the leap.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

sys.path.insert(0, str(Path(__file__).parents[1]))

import toolchain
from benchmarks.sheet import animation, contact_sheet, curve
from toolchain.build.entries import sampler
from toolchain.errors import ResourceError
from toolchain.formats.bundle import RECIPE_FILE
from toolchain.formats.manifest import Manifest
from toolchain.formats.schedule import PRESETS, DynamicLeap, StaticLeap, Step
from toolchain.models.family import find_family
from toolchain.planning.pipelines import load_pipeline
from toolchain.planning.sampling import sampling
from toolchain.player.sampler import initial_noise
from toolchain.player.video import to_bytes
from training.grammar import Scene, split
from training.judge import ATTRIBUTES, BORDER, judge


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
DEMO = "leap after 15"
"""The setting that the animation shows: the recipe's own."""
SHEET_PROMPT = 9
"""Which prompt the contact sheet shows: one across the picture, so that its path is seen."""
COLUMNS = dict.fromkeys(ATTRIBUTES, "{:.1%}") | {
    "psnr": "{:.1f}",
    "ssim": "{:.3f}",
    "flicker": "{:.4f}",
    "motion": "{:.4f}",
}
"""What is shown of :func:`figures`, and how. Flicker and motion: mean second and first differences over time."""


def with_setting(bundle: toolchain.Bundle, setting: Setting) -> Manifest:
    """A bundle's manifest with its recipe's steps under another setting; the player reads nothing else."""
    recipe = toolchain.load_recipe(bundle.path / RECIPE_FILE)
    own = recipe.sampler.model_copy(update={"leap": setting.leap, "merged_steps": setting.merged})
    other = recipe.model_copy(update={"sampler": own})
    groups = load_pipeline(recipe, "transformer", find_family(recipe.model)).groups
    entry = sampler(other, sampling(other, find_family(recipe.model), groups))
    return bundle.manifest.model_copy(update={"sampler": entry})


@dataclass
class Video:
    """What a setting made of a prompt, and how long the denoising took."""

    frames: torch.Tensor
    calls: int
    seconds: float


def player(bundle: toolchain.Bundle, setting: Setting) -> toolchain.Player:
    """A player of the bundle's artifacts under a setting."""
    return toolchain.Player(dataclasses.replace(bundle, manifest=with_setting(bundle, setting)))


@dataclass
class Denoised:
    """What a setting made of a prompt before it is decoded."""

    latents: torch.Tensor
    calls: int
    seconds: float


def denoise(player: toolchain.Player, scene: Scene, seed: int) -> Denoised:
    """A prompt's latents, and what they took."""
    y, mask = player.encode(scene.prompt())
    calls, began = -1, time.perf_counter()  # one more report comes when all calls are done

    def count(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += stage == "denoise"

    player.progress = count
    latents = player.denoise(y, mask, seed)
    return Denoised(latents, calls, time.perf_counter() - began)


def decode(player: toolchain.Player, made: Denoised) -> Video:
    """The video of some latents."""
    return Video(player.decode(made.latents), made.calls, made.seconds)


def make(player: toolchain.Player, scene: Scene, seed: int) -> Video:
    """Play one prompt."""
    return decode(player, denoise(player, scene, seed))


def read_off(frames: torch.Tensor, scene: Scene, reference: torch.Tensor) -> dict[str, float]:
    """What a video ``[F, 3, H, W]`` shows of its prompt, and how near it comes to another one of the same noise.

    ``still`` is the mean absolute difference of consecutive frames, in levels of 255, where nothing ever moves: in the
    outermost pixels, which no shape covers.
    """
    right = judge(frames.transpose(0, 1)).correct(scene)
    a, b = to_bytes(reference).numpy(), to_bytes(frames).numpy()
    same = bool((a == b).all())
    steps = frames.diff(dim=0)
    edge = torch.ones(frames.shape[2:], dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return {k: float(v) for k, v in right.items()} | {
        "all": float(all(right.values())),
        "motion": float(steps.abs().mean()),
        "flicker": float(steps.diff(dim=0).abs().mean()),
        "still": float(steps[:, :, edge].abs().mean()) * 127.5,
        "psnr": float("inf") if same else float(peak_signal_noise_ratio(a, b)),
        "ssim": float(structural_similarity(a, b, channel_axis=3)) if not same else 1.0,
    }


def figures(videos: list[Video], scenes: list[Scene], full: list[Video]) -> dict[str, float]:
    """Means over the prompts; of the seconds the median, since other work on the machine disturbs some.

    ``worst`` is the least PSNR of all.
    """
    rows = [
        read_off(video.frames, scene, reference.frames) | {"calls": float(video.calls), "seconds": video.seconds}
        for video, scene, reference in zip(videos, scenes, full, strict=True)
    ]
    means = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
    worst = min(r["psnr"] for r in rows)
    return means | {"seconds": statistics.median(r["seconds"] for r in rows), "worst": worst}


def prompts(count: int) -> list[Scene]:
    """Held-out scenes, the same for every ``count``: all once as they are, then in random sizes and speeds."""
    rng = random.Random(0)
    plain = split()[1]
    varied = (scene.varied(rng) for scene in itertools.cycle(plain))
    return list(itertools.islice(itertools.chain(plain, varied), count))


def velocity_cosines(bundle: toolchain.Bundle, scenes: list[Scene]) -> torch.Tensor:
    """Cosines of consecutive velocities ``[scenes, steps - 1]`` (as figure 4 of arXiv 2502.04363)."""
    full = player(bundle, SETTINGS[0])
    g = bundle.manifest.geometry
    curves = []
    for seed, scene in enumerate(scenes):
        noise = initial_noise(seed, (g.latent_channels, g.latent_frames, g.latent_height, g.latent_width))
        places: list[torch.Tensor] = [torch.from_numpy(noise).flatten()]
        lengths: list[float] = []

        def keep(
            step: Step, z: torch.Tensor, places: list[torch.Tensor] = places, lengths: list[float] = lengths
        ) -> None:
            places.append(z.flatten().clone())
            lengths.append(step.dt)

        y, mask = full.encode(scene.prompt())
        full.denoise(y, mask, seed, on_step=keep)
        v = [(b - a) / dt for (a, b), dt in zip(itertools.pairwise(places), lengths, strict=True)]
        pairs = itertools.pairwise(v)
        curves.append([float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs])
    return torch.tensor(curves)


def coreml(path: Path) -> toolchain.Bundle | None:
    """The shipped recipe's float16 bundle for Core ML, or None where it cannot run."""
    recipe = toolchain.load_recipe("tiny", ["target=coreml"])
    bundle = toolchain.load_bundle(path) if path.exists() else toolchain.compile_recipe(recipe, path)
    try:
        toolchain.Player(bundle).encode("a red circle")
    except ResourceError as error:
        print(f"no row for Core ML: {error}", file=sys.stderr)
        return None
    return bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--bundle", type=Path, help="an ExecuTorch bundle of recipes/tiny.yaml")
    parser.add_argument("--coreml", type=Path, help="a Core ML bundle of recipes/tiny.yaml")
    parser.add_argument("--figures", type=Path, help="write the contact sheet, the animation and the curve here")
    args = parser.parse_args()
    scenes = prompts(args.prompts)
    with tempfile.TemporaryDirectory() as tmp:
        path = args.bundle or toolchain.compile_recipe(toolchain.load_recipe("tiny"), Path(tmp) / "bundle").path
        bundle = toolchain.load_bundle(path)
        players = {setting.name: player(bundle, setting) for setting in SETTINGS}
        if other := coreml(args.coreml or Path(tmp) / "coreml"):
            players[f"{SETTINGS[0].name}, Core ML float16"] = player(other, SETTINGS[0])
        made: dict[str, list[Video]] = {name: [] for name in players}
        for seed, scene in enumerate(scenes):
            for name, one in players.items():  # in turns: what else the machine does disturbs all alike
                made[name].append(make(one, scene, seed))
        print(f"| setting | calls | seconds | {' | '.join(COLUMNS)} |")
        print("|" + "---|" * (len(COLUMNS) + 3))
        for name, videos in made.items():
            f = figures(videos, scenes, made[SETTINGS[0].name])
            numbers = " | ".join(form.format(f[column]) for column, form in COLUMNS.items())
            print(f"| {name} | {f['calls']:.1f} | {f['seconds']:.2f} | {numbers} |", flush=True)
        if args.figures:
            shown = {name: to_bytes(videos[SHEET_PROMPT].frames) for name, videos in made.items()}
            contact_sheet(shown, args.figures / "settings.png")
            animation([to_bytes(v.frames) for v in made[DEMO][::5]], args.figures / "tiny.gif")
            cosines = velocity_cosines(bundle, scenes)
            mean, low, high = cosines.mean(dim=0), cosines.min(dim=0).values, cosines.max(dim=0).values
            print("cosines:", " ".join(f"{c:.3f}" for c in mean))
            title = f"Cosine of each step's velocity with the one before, {len(scenes)} videos"
            curve(mean.tolist(), low.tolist(), high.tolist(), title, args.figures / "velocity.svg")


if __name__ == "__main__":
    main()
