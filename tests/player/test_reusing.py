"""Steps that leave out blocks: played from a bundle, made eagerly, and worked out from the manifest's words alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import replay

import toolchain
from tests import test_family as third_party
from toolchain.accuracy.eager import EagerPipeline
from toolchain.build import entries as describe
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.unrolled import unroll
from toolchain.player import Player

pytestmark = pytest.mark.slow

PROMPT = "a blue square"
ALIKE = 80.0
"""Decibels, as for the samplers that compute everything."""
SAMPLERS: dict[str, dict[str, Any]] = {
    "reuse": {"steps": 5, "reuse": {"steps": [1, 3]}},
    "merged-leap": {"steps": 6, "merged_steps": 2, "leap": 4, "reuse": {"steps": [2, 4]}},
    "dynamic-leap": {"steps": 20, "leap": "paper", "reuse": {"steps": [2, 5, 6]}},
}
LAYERS: dict[str, dict[str, Any]] = {
    "all": {"reuse": {"steps": [1, 2, 4]}},
    "two": {"reuse": {"steps": [1, 4], "blocks": ["layer_1", "layer_2"]}, "leap": 4},
    "rule": {"steps": 12, "reuse": {"rule": {"threshold": 1.0}}},
    "rule and leap": {
        "steps": 12,
        "leap": 9,
        "merged_steps": 4,
        "reuse": {
            "rule": {"threshold": 2.0, "polynomial": [3.0, 1.0, 0.01], "first": 2, "last": 2},
            "observes": "start.stream",
            "blocks": ["layer_1", "layer_2"],
        },
    },
    "several": {
        "merged_steps": 2,
        "reuse": [
            {"steps": [1, 3], "blocks": ["layer_0", "layer_1"]},
            {"steps": [4]},
            {"steps": [2], "blocks": ["layer_2", "layer_2"]},
        ],
    },
}

Players = Callable[..., Player]
Variant = Callable[..., Recipe]
Eager = Callable[[Recipe], EagerPipeline]


# --- the published model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_the_eager_pipeline(
    name: str, variant: Variant, player: Players, eager: Eager, psnr: Any, events: Any
) -> None:
    own = variant(**SAMPLERS[name])
    playing = player(own)
    video = playing.video(PROMPT, seed=1)
    assert psnr(video, eager(own).video(PROMPT, seed=1)) >= ALIKE
    whole = player(variant(**{k: v for k, v in SAMPLERS[name].items() if k != "reuse"})).video(PROMPT, seed=1)
    assert psnr(video, whole) < ALIKE, "or else nothing is told apart"
    runs = [e for e in events(playing) if e["component"] == "transformer" and e["cat"] == "run"]
    runs = [e["name"].partition(".")[0] for e in runs]
    sampler = playing.manifest.sampler
    reused = [s.reuse is not None for s in sampler.steps[: runs.count("final")]]
    assert any(reused)
    ((left_out,),) = [r.blocks for r in sampler.ranges.values()]
    assert runs.count(left_out) == len(reused) - sum(reused)


def test_what_the_manifest_says_is_enough(variant: Variant, player: Players) -> None:
    playing = player(variant(**SAMPLERS["merged-leap"]))
    y, mask = playing.encode(PROMPT)
    expected = replay(playing.bundle, y, mask, 2)
    torch.testing.assert_close(playing.denoise(y, mask, 2), expected, rtol=1e-5, atol=1e-5)


# --- a model with several layers ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        yield third_party.made(tmp_path_factory.mktemp("toy"), patch)


@pytest.fixture(scope="module")
def layers(folder: Path) -> Callable[..., Recipe]:
    changes = {"transformer": {"checkpoint": "transformer", "passes": ["token-merge", "partition"]}}
    whole = third_party.recipe(**changes, gate={"mode": "none"})

    def make(**sampler: Any) -> Recipe:
        return whole.model_copy(
            update={"sampler": SamplerRecipe.model_validate({"steps": 6, "guidance": 1.5} | sampler)}
        )

    return make


@pytest.fixture(scope="module")
def built(folder: Path, layers: Callable[..., Recipe]) -> Bundle:
    return toolchain.compile_recipe(layers(**LAYERS["several"]), folder / "bundle", base=folder)


@pytest.mark.parametrize("name", LAYERS)
def test_ranges_of_layers(
    name: str, folder: Path, built: Bundle, layers: Callable[..., Recipe], edit: Callable[..., Bundle], psnr: Any
) -> None:
    recipe = layers(**LAYERS[name])
    bundle = built
    if name != "several":
        sampler = describe.sampler(recipe, toolchain.plan(recipe, base=folder).sampling)
        bundle = edit(built, sampler=sampler)
    playing, model = Player(bundle, warn=lambda _: None), EagerPipeline(recipe, folder)
    y, mask = playing.encode(PROMPT)
    latents = playing.denoise(y, mask, 3)
    torch.testing.assert_close(latents, model.denoise(y, mask, 3), rtol=1e-3, atol=1e-3)
    log: list[str | None] = []
    torch.testing.assert_close(latents, replay(bundle, y, mask, 3, log), rtol=1e-4, atol=1e-4)
    assert playing.played is not None
    left_out = sum(len(bundle.manifest.sampler.ranges[n].blocks) for n in log if n)
    assert left_out
    assert playing.played.calls == 5 * len(log) - left_out
    if bundle.manifest.sampler.rule:
        assert None in log[1:-1], "some are left out, and some are not"
    assert psnr(playing.video(PROMPT, 3), model.video(PROMPT, 3)) >= ALIKE


def test_a_bundle_that_reuses_is_built_loaded_and_played_in_little_memory(built: Bundle) -> None:
    read = toolchain.load_bundle(built.path)
    assert read.manifest == built.manifest
    assert list(read.manifest.sampler.ranges) == ["layer_0-layer_1", "layer_0-layer_2", "layer_2"]
    made = read.manifest.loading.made_from
    assert made is not None
    least = unroll(Run.from_data(made.run)).least_budget
    video = None
    for budget in (None, least, 2 * least):
        playing = Player(read, memory_budget=budget, warn=lambda _: None)
        for _ in range(2):
            again = playing.video(PROMPT, 3)
            assert video is None or torch.equal(video, again), "nothing is left over from the video before"
            video = again
        played, predicted = playing.played, playing.followed.predicted
        assert played is not None
        assert predicted is not None
        assert [played.calls, played.loads, played.loads_bytes] == [
            predicted.calls,
            predicted.loads,
            predicted.loads_bytes,
        ]
        assert played.peak_bytes <= played.budget_bytes
