"""A bundle whose manifest is of an older version is the same bundle, and plays the same video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toolchain.formats.bundle import Bundle, load_bundle
from toolchain.formats.loading import loads_of
from toolchain.formats.recipe import Recipe
from toolchain.models.family import find_family
from toolchain.player import Player

pytestmark = pytest.mark.slow


def as_format_1(data: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Today's manifest in the words of the first format."""
    data["format_version"] = 1
    del data["loading"]
    sampler, text, stages = data["sampler"], data["text"], data["decoding"]["stages"]
    for new in ("once", "each", "time_scale", "difference", "ranges", "rule"):
        del sampler[new]
    for step in sampler["steps"]:
        del step["guidance"], step["reuse"]
    timesteps = find_family(recipe.model).timesteps(recipe)
    sampler |= {"merged_steps": recipe.sampler.merged_steps, "timesteps": list(timesteps), "model_fps": 8.0}
    del text["suffixes"], text["rate"]
    text |= {"cleaning": "open-sora-v1.2", "aesthetic_score": 6.5}
    assert all(s["tiles"] is None for s in stages)
    chunks = [{"latents": p["takes"], "frames": p["gives"], "function": p["function"]} for p in stages[0]["pieces"]]
    data["decoding"] = {"chunks": chunks, "frames_per_call": stages[1]["pieces"][0]["takes"]}
    for component in data["components"].values():
        del component["default_function"]
        component["resident"] = [b["name"] for b in component["blocks"]]
        component["passes"] = component["passes"].split()
        outputs: dict[str, list[str]] = {}
        for output in component["outputs"]:
            outputs.setdefault(output["rate"], []).append(output["source"])
        component["outputs"] = outputs
        for given in component["inputs"]:
            given["meaning"] = given.pop("feed")["kind"]
        for block in component["blocks"]:
            del block["weight_bytes"]
    return data


@pytest.fixture
def older(bundle: Bundle, recipe: Recipe, tmp_path: Path) -> Bundle:
    """The bundle as the first version would have written it."""
    shutil.copytree(bundle.path, tmp_path / "older")
    path = tmp_path / "older/manifest.json"
    path.write_text(json.dumps(as_format_1(json.loads(path.read_text()), recipe)))
    return load_bundle(path.parent)


def test_it_says_what_todays_says(older: Bundle, bundle: Bundle) -> None:
    found, today = (b.manifest.model_dump(mode="json") for b in (older, bundle))
    for component in today["components"].values():
        component["passes"] = ""  # the first format had no options in it
    today["gate"]["mode"] = "release"  # what the older word for this mode meant
    loads = loads_of(found.pop("loading")["plan"])
    assert loads == loads_of(today.pop("loading")["plan"])  # everything stays, in both
    assert found == today


def test_it_plays_the_same_video(older: Bundle, player: Callable[..., Player]) -> None:
    assert torch.equal(player(bundle=older).video("a blue square", seed=1), player().video("a blue square", seed=1))
