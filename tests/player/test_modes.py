"""Every way to call the denoiser, on every target: what is played is what the eager pipeline makes.

One bundle a target has all functions; the modes are schedules of it. The model is a third party's, with three layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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
from toolchain.formats.recipe import Recipe, SamplerRecipe, TargetSpec
from toolchain.player import Player

pytestmark = pytest.mark.slow

PROMPT, SEED = "a wooden train", 3
LEAST_DB = {"executorch": 60.0, "coreml": 40.0, "onnx": 60.0}
"""Decibels that are promised of played against eager: float32, and float16 on Core ML."""
PASSES = ["token-merge", "guidance-split", "partition"]
LAST, NONE = ({"conditional": {"steps": [3, 4], "difference": d}} for d in ("last", "none"))
MERGED, LEAP = {"merged_steps": 2}, {"leap": 4}
REUSE = {"reuse": {"steps": [2, 4]}}
RANGE = {"reuse": {"steps": [2, 4], "blocks": ["layer_0", "layer_1"]}}
RULE = {"reuse": {"rule": {"threshold": 1.0}}}
DYNAMIC = {"steps": 20, "leap": "paper"}
MODES: dict[str, dict[str, Any]] = {
    "base": {},
    "merged": MERGED,
    "leap": LEAP,
    "conditional": NONE,
    "conditional-last": LAST,
    "reuse": REUSE,
    "range": RANGE,
    "rule": RULE,
    "merged-leap": MERGED | LEAP,
    "merged-conditional": {"merged_steps": 4} | LAST,
    "merged-reuse": {"merged_steps": 3} | REUSE,
    "leap-conditional": LEAP | LAST,
    "leap-reuse": LEAP | REUSE,
    "conditional-reuse": LAST | REUSE,
    "conditional-range": NONE | RANGE,
    "rule-conditional": RULE | LAST,
    "rule-merged": RULE | MERGED,
    "dynamic-leap-reuse": DYNAMIC | REUSE,
    "dynamic-leap-conditional": DYNAMIC | NONE,
    "all": {"merged_steps": 4} | LEAP | LAST | REUSE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        yield third_party.made(tmp_path_factory.mktemp("toy"), patch)


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    changes = {"transformer": {"checkpoint": "transformer", "passes": PASSES}}
    return third_party.recipe(**changes, gate={"mode": "none"})


@pytest.fixture(scope="module", params=LEAST_DB)
def built(request: pytest.FixtureRequest, folder: Path, recipe: Recipe) -> Bundle:
    own = recipe.model_copy(update={"target": TargetSpec(name=request.param)})
    return toolchain.compile_recipe(own, folder / request.param, base=folder)


@pytest.mark.parametrize("mode", MODES)
def test_played_as_eager(mode: str, folder: Path, recipe: Recipe, built: Bundle, psnr: Any) -> None:
    sampler = SamplerRecipe.model_validate({"steps": 6, "guidance": 1.5} | MODES[mode])
    own = recipe.model_copy(update={"sampler": sampler, "target": TargetSpec(name=built.manifest.target.name)})
    planned = toolchain.plan(own, base=folder)
    changes = {"sampler": describe.sampler(own, planned.sampling), "loading": planned.loading.entry()}
    bundle = dataclasses.replace(built, manifest=built.manifest.model_copy(update=changes))
    playing, model = Player(bundle, warn=lambda _: None), EagerPipeline(own, folder)
    video = playing.video(PROMPT, SEED)
    assert psnr(video, model.video(PROMPT, SEED)) >= LEAST_DB[built.manifest.target.name]
    if sampler.leap is None or sampler.leap.kind == "static":
        y, mask = playing.encode(PROMPT)
        torch.testing.assert_close(playing.denoise(y, mask, SEED), replay(bundle, y, mask, SEED), rtol=1e-4, atol=1e-4)
