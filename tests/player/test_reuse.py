"""Steps that leave out blocks: played from a bundle, made eagerly, and worked out from the manifest's words alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from toolchain.accuracy.eager import EagerPipeline
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe
from toolchain.player import Player
from toolchain.player.opening import open_engine
from toolchain.player.sampler import initial_noise

pytestmark = pytest.mark.slow

PROMPT = "a blue square"
ALIKE = 80.0
"""Decibels, as for the samplers that compute everything."""
SAMPLERS: dict[str, dict[str, Any]] = {
    "reuse": {"steps": 5, "reuse": {"steps": [1, 3]}},
    "merged": {"steps": 5, "merged_steps": 2, "reuse": {"steps": [2, 4]}},
    "leap": {"steps": 5, "leap": 3, "reuse": {"steps": [2, 3]}},
    "dynamic-leap": {"steps": 20, "leap": "paper", "reuse": {"steps": [2, 5, 6]}},
}

Players = Callable[..., Player]
Variant = Callable[..., Recipe]


@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_the_eager_pipeline(
    name: str, variant: Variant, player: Players, eager: Callable[[Recipe], EagerPipeline], psnr: Any, events: Any
) -> None:
    own = variant(**SAMPLERS[name])
    playing = player(own)
    video = playing.video(PROMPT, seed=1)
    assert psnr(video, eager(own).video(PROMPT, seed=1)) >= ALIKE
    whole = player(variant(**{k: v for k, v in SAMPLERS[name].items() if k != "reuse"})).video(PROMPT, seed=1)
    assert psnr(video, whole) < ALIKE, "or else nothing is told apart"
    sampler = playing.manifest.sampler
    runs = [e["name"].partition(".")[0] for e in events(playing) if e["component"] == "transformer" and e["cat"] == "run"]
    (left_out,) = [r.blocks for r in sampler.ranges.values()]
    calls = runs.count("final")
    reused = [s.reuse is not None for s in sampler.steps[:calls]]
    assert sum(reused) > 0
    assert all(runs.count(block) == calls - sum(reused) for block in left_out)
