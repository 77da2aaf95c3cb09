"""Tiles in space: they cover a frame, weights sum to one, and what cannot be is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import GOLDEN

import toolchain
from toolchain.errors import RecipeError
from toolchain.formats.manifest import Manifest
from toolchain.formats.recipe_file import find_recipe, load_recipe
from toolchain.formats.tiles import Tiles, in_tiles, starts, tiles_of, weights
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig
from toolchain.ui.planning import plan_json

FACTOR = 8


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Length of a frame, size of a tile, overlap."""
    length = draw(st.integers(1, 60))
    size = draw(st.integers(1, length))
    return length, size, draw(st.integers(0, size - 1))


@st.composite
def tilings(draw: st.DrawFn) -> Tiles:
    rows, columns = draw(axes()), draw(axes())
    scale = draw(st.integers(1, 4))
    overlap = min(rows[2], columns[2], rows[1] - 1, columns[1] - 1)
    sizes = {"height_px": rows[1] * scale, "width_px": columns[1] * scale, "overlap_px": overlap * scale}
    return tiles_of((rows[0], columns[0]), **sizes, factor=scale)


@given(axis=axes())
def test_tiles_cover_a_frame_and_end_with_it(axis: tuple[int, int, int]) -> None:
    length, size, overlap = axis
    found = starts(length, size, overlap)
    assert (found[0], found[-1] + size) == (0, length)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(step == size - overlap for step in steps[:-1])
    assert all(0 < step <= size - overlap for step in steps[-1:])


@given(axis=axes())
def test_weights_sum_to_one_and_are_even_where_a_tile_is_alone(axis: tuple[int, int, int]) -> None:
    length, size, overlap = axis
    at = starts(length, size, overlap)
    found = weights(at, size, overlap)
    sums, tiles = [0.0] * length, [0] * length
    for start, own in zip(at, found, strict=True):
        assert len(own) == size
        for p, weight in enumerate(own):
            assert 0 < weight <= 1
            sums[start + p] += weight
            tiles[start + p] += 1
    assert sums == pytest.approx([1.0] * length, abs=1e-12)
    assert all(w == 1 for start, own in zip(at, found, strict=True) for p, w in enumerate(own) if tiles[start + p] == 1)


def test_over_an_overlap_one_tile_fades_into_the_other() -> None:
    first, second = weights([0, 6], 10, 4)
    assert first == pytest.approx([1.0] * 6 + [0.875, 0.625, 0.375, 0.125])
    assert second == pytest.approx([0.125, 0.375, 0.625, 0.875] + [1.0] * 6)


def test_without_an_overlap_tiles_lie_side_by_side() -> None:
    assert weights([0, 3], 3, 0) == [[1.0] * 3] * 2


@given(tiles=tilings(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_what_is_the_same_in_tiles_and_whole_comes_back(tiles: Tiles, seed: int) -> None:
    """Of each place by itself: repeated ``scale`` times, and doubled."""
    frames = torch.randn(2, 3, *tiles.frame, generator=torch.Generator().manual_seed(seed))
    seen = []

    def compute(part: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(part.shape))
        return 2 * part.repeat_interleave(tiles.scale, 2).repeat_interleave(tiles.scale, 3)

    found = in_tiles(tiles, frames, compute)
    assert seen == [(2, 3, tiles.height, tiles.width)] * tiles.count
    torch.testing.assert_close(found, compute(frames), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> OpenSoraVAE:
    config = json.loads((find_recipe("tiny").parent / "tiny/vae/config.json").read_text())
    torch.manual_seed(0)
    return OpenSoraVAE(OpenSoraVAEConfig.from_json(config)).eval().requires_grad_(False)


def test_one_tile_is_the_whole_frame_to_the_last_bit(model: OpenSoraVAE) -> None:
    z = torch.randn(1, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    one = tiles_of((4, 6), height_px=32, width_px=48, overlap_px=16, factor=FACTOR)
    assert one.count == 1
    assert torch.equal(model.decode(z, 4, one), model.decode(z, 4))


def test_several_tiles_are_blended_from_each_ones_own(model: OpenSoraVAE) -> None:
    """With weights worked out here: both tiles of 4 columns have the fourth of 7."""
    z = torch.randn(1, 4, 1, 4, 7, generator=torch.Generator().manual_seed(0))
    two = tiles_of((4, 7), height_px=32, width_px=32, overlap_px=8, factor=FACTOR)
    x_z = model.decode_temporal(z, 1)[0].transpose(0, 1)
    left, right = (model.spatial_vae.decode(x_z[..., i : i + 4]) for i in two.lefts)
    fade = (torch.arange(8) + 0.5) / 8
    middle = left[..., 24:] * (1 - fade) + right[..., :8] * fade
    expected = torch.cat((left[..., :24], middle, right[..., 8:]), -1)
    torch.testing.assert_close(model.decode(z, 1, two)[0].transpose(0, 1), expected, rtol=0, atol=1e-6)


# --- what is refused ---------------------------------------------------------------------------------

REFUSED = {
    "a height that is no multiple": (
        "{height: 36, width: 32, overlap: 8}",
        "vae.tiles.height: 36 is no multiple of 8, the pixels that a latent stands for",
    ),
    "an overlap that is no multiple": (
        "{height: 32, width: 32, overlap: 4}",
        "vae.tiles.overlap: 4 is no multiple of 8, the pixels that a latent stands for",
    ),
    "a tile larger than the frame": (
        "{height: 32, width: 128, overlap: 8}",
        "vae.tiles.width: 128 is more than the 64 pixels of a frame; give at most these",
    ),
    "an overlap as large as the tile": (
        "{height: 64, width: 32, overlap: 32}",
        "vae.tiles.overlap: 32 is not less than height 64 and width 32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tiles_that_cannot_be(name: str) -> None:
    asked, said = REFUSED[name]
    path = find_recipe("tiny")
    with pytest.raises(RecipeError) as error:
        toolchain.plan(load_recipe(path, [f"vae.tiles={asked}", "target=onnx"]), base=path.parent)
    assert str(error.value) == said


@pytest.mark.parametrize("asked", ["{height: 32, width: 32}", "{height: 0, width: 32, overlap: 0}", "32"])
def test_tiles_that_are_none(asked: str) -> None:
    with pytest.raises(RecipeError, match=r"vae\.tiles"):
        load_recipe(find_recipe("tiny"), [f"vae.tiles={asked}"])


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a gap": lambda t: t.update(lefts=[0, 6]),
    "out of order": lambda t: t.update(tops=[0, 4, 2, 4]),
    "a first row that is left out": lambda t: t.update(tops=[2, 4]),
    "no tiles": lambda t: t.update(tops=[]),
    "an overlap as large as a tile": lambda t: t.update(overlap=4),
    "another blending": lambda t: t.update(blending="cosine"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tiles_that_contradict_themselves(name: str) -> None:
    good = tiles_of((8, 8), height_px=32, width_px=32, overlap_px=16, factor=FACTOR).model_dump()
    assert Tiles.model_validate(good).count == 9
    BROKEN[name](good)
    with pytest.raises(ValidationError):
        Tiles.model_validate(good)


def test_a_manifest_whose_tiles_are_not_its_blocks(tmp_path: Path) -> None:
    """Blocks of whole frames, as in every bundle without tiles."""
    from toolchain.formats.migrations import migrated

    data = migrated(json.loads((GOLDEN / "manifest_v1.json").read_text()))
    g = data["geometry"]
    frame = (g["latent_height"], g["latent_width"])
    sizes = {"height_px": frame[0] * FACTOR, "width_px": frame[1] * FACTOR}
    for other, said in (
        ({}, None),
        ({"width_px": sizes["width_px"] - FACTOR}, r"what blocks take, but that is \[8, 8\]"),
    ):
        tiles = tiles_of(frame, **(sizes | other), overlap_px=FACTOR, factor=FACTOR)
        data["decoding"]["stages"][1]["tiles"] = tiles.model_dump()
        if said is None:
            assert Manifest.model_validate(data).decoding is not None
            continue
        with pytest.raises(ValidationError, match=said):
            Manifest.model_validate(data)


# --- what is shown -----------------------------------------------------------------------------------


def test_a_plan_says_where_tiles_are() -> None:
    path = find_recipe("tiny")
    recipe = load_recipe(path, ["vae.tiles={height: 32, width: 48, overlap: 16}", "target=onnx"])
    (tiles,) = plan_json(toolchain.plan(recipe, base=path.parent))["tiles"]
    assert tiles == {
        "height": 4,
        "width": 6,
        "overlap": 2,
        "scale": 8,
        "tops": [0, 2, 4],
        "lefts": [0, 2],
        "blending": "linear",
    }
