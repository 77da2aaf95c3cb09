"""The same prompt on every target, each executed on this machine, against the same pipeline in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from toolchain.accuracy.eager import EagerPipeline
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe, TargetSpec
from toolchain.player import Player

pytestmark = pytest.mark.slow

PROMPT, SEED = "a red fox", 5
AT_LEAST = {"executorch": 80.0, "onnx": 80.0, "coreml": 40.0}
"""Decibels against eager float32. Core ML computes in float16."""


@pytest.fixture(scope="module")
def videos(
    build: Callable[[Recipe], Bundle], recipe: Recipe, eager: Callable[[Recipe], EagerPipeline]
) -> dict[str, torch.Tensor]:
    """One video a target, and ``eager``."""
    found = {"eager": eager(recipe).video(PROMPT, SEED)}
    for name in AT_LEAST:
        bundle = build(recipe.model_copy(update={"target": TargetSpec(name=name)}))
        found[name] = Player(bundle).video(PROMPT, SEED)
    return found


@pytest.mark.parametrize("target", AT_LEAST)
def test_a_target_plays_what_eager_does(videos: dict[str, torch.Tensor], psnr: Any, target: str) -> None:
    assert psnr(videos[target], videos["eager"]) >= AT_LEAST[target]


def test_targets_agree_with_one_another(videos: dict[str, torch.Tensor], psnr: Any) -> None:
    assert psnr(videos["onnx"], videos["executorch"]) >= 80.0
    assert psnr(videos["coreml"], videos["onnx"]) >= 40.0
    assert float(videos["eager"].std()) > 0.01  # no empty picture
