"""Decoding in tiles: what is played is what the eager pipeline makes in the same tiles, and no whole frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from toolchain.accuracy.eager import EagerPipeline
from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.player import Player
from toolchain.player.opening import open_engine
from toolchain.ui.bundles import bundle_table

pytestmark = pytest.mark.slow
Psnr = Callable[[torch.Tensor, torch.Tensor], float]
PROMPT = "a small red circle"
TILES = {"height": 24, "width": 32, "overlap": 8}
"""Of frames of 40×48: two rows of tiles, and two columns that overlap by 16."""


@pytest.fixture(scope="module")
def tiled(recipe_data: dict[str, Any]) -> Recipe:
    vae = {"checkpoint": "vae", "frames_per_call": 4, "tiles": TILES}
    return parse_recipe({**recipe_data, "vae": vae, "gate": {"mode": "none"}, "target": "onnx"})


@pytest.fixture(scope="module")
def bundle(build: Callable[[Recipe], Bundle], tiled: Recipe) -> Bundle:
    return build(tiled)


def test_it_is_what_eager_tiles_are(
    bundle: Bundle, tiled: Recipe, eager: Callable[[Recipe], EagerPipeline], psnr: Psnr
) -> None:
    own = eager(tiled)
    playing = Player(bundle, warn=lambda _: None)
    video = playing.video(PROMPT, 5)
    assert video.shape == (22, 3, 40, 48)
    expected = own.video(PROMPT, 5)
    assert psnr(video, expected) > 60
    whole = eager(tiled.model_copy(update={"vae": tiled.vae.model_copy(update={"tiles": None})}))  # type: ignore[union-attr]
    assert psnr(expected, whole.video(PROMPT, 5)) < 60
    runs = [r for r in playing.trace.records if r.category == "run" and r.block.startswith("vae/spatial")]
    blocks = sum(b.rate == "frames" for b in bundle.manifest.components["vae"].blocks)
    assert len(runs) == blocks * 6 * 2 * 2  # groups of frames, rows, columns


def test_a_second_reader_gives_the_same_pixels(bundle: Bundle, psnr: Psnr) -> None:
    """From what the manifest says of tiles alone, weights by the formula of its documentation."""
    latents = torch.randn(1, 4, 7, 5, 6, generator=torch.Generator().manual_seed(0))
    video = Player(bundle, warn=lambda _: None).decode(latents)
    assert bundle.manifest.decoding is not None
    frames = latents
    for stage in bundle.manifest.decoding.stages:
        frames = second_reader(bundle, stage.model_dump(), frames)
    assert psnr(video, frames[0].transpose(0, 1)) > 100


def second_reader(bundle: Bundle, stage: dict[str, Any], frames: torch.Tensor) -> torch.Tensor:
    """``[1, C, T, h, w]`` to the same of the next stage."""
    vae = bundle.manifest.components["vae"]
    blocks = {b.name: b for b in vae.blocks}
    tables = load_file(bundle.path / vae.tables_file.path) if vae.tables_file else {}
    engines = {name: open_engine(bundle, "vae", blocks[name]) for name in vae.load_order[stage["rate"]]}

    def run(clip: torch.Tensor, function: str) -> torch.Tensor:
        given = clip if stage["layout"] == "clip" else clip[0].transpose(0, 1)
        values = {f"tables.{k}": v for k, v in tables.items()}
        values |= {f"inputs.{i.name}": given for i in vae.inputs if i.rate == stage["rate"]}
        for name, engine in engines.items():
            own = function if function in blocks[name].functions else vae.default_function
            results = engine(own, {i.name: values[i.source].contiguous() for i in blocks[name].inputs})
            values |= {f"{name}.{k}": v for k, v in results.items()}
        (result,) = [values[o.source] for o in vae.outputs if o.rate == stage["rate"]]
        return result if stage["layout"] == "clip" else result.transpose(0, 1)[None]

    tiles = stage["tiles"] or {"height": frames.shape[3], "width": frames.shape[4], "tops": [0], "lefts": [0]}
    scale, fade = tiles.get("scale", 1), tiles.get("overlap", 0) * tiles.get("scale", 1)
    size = [scale * tiles[name] for name in ("height", "width")]
    ramps = [
        torch.tensor([min(1.0, (p + 0.5) / fade, (n - p - 0.5) / fade) if fade else 1.0 for p in range(n)]).double()
        for n in size
    ]
    weight = ramps[0][:, None] * ramps[1]
    made, start = [], 0
    for piece in stage["pieces"]:
        clip = frames[:, :, start : start + piece["takes"]]
        start += piece["takes"]
        clip = torch.cat([clip, *[clip[:, :, :1]] * (piece["takes"] - clip.shape[2])], 2)
        total: Any = 0
        above: Any = 0
        for top in tiles["tops"]:
            for left in tiles["lefts"]:
                part = run(
                    clip[..., top : top + tiles["height"], left : left + tiles["width"]], piece["function"]
                ).double()
                whole = (frames.shape[3] * scale, frames.shape[4] * scale)
                pad = (left * scale, whole[1] - left * scale - size[1], top * scale, whole[0] - top * scale - size[0])
                above = above + torch.nn.functional.pad(part * weight, pad)
                total = total + torch.nn.functional.pad(weight, pad)
        made.append((above / total).float()[:, :, : piece["gives"]])
    return torch.cat(made, 2)


def test_it_says_so(bundle: Bundle) -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(bundle_table(bundle))
    assert "the decoder takes frames in 4 tiles of 32×24 pixels, which overlap by 8 or more" in shown.get()


def test_latents_of_another_size_are_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"frames is \["):
        Player(bundle, warn=lambda _: None).decode(torch.zeros(1, 4, 7, 8, 8))
