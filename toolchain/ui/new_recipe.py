"""A first recipe of a user's own, as the text of a file with comments."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolchain import plugins
from toolchain.errors import CheckpointError, RecipeError
from toolchain.formats.device import find_device, shipped_devices
from toolchain.formats.environment import escaped
from toolchain.formats.recipe import COMPONENTS
from toolchain.formats.recipe_file import parse_recipe
from toolchain.formats.yaml_text import QuotingDumper, load_yaml
from toolchain.ir.target import find_target
from toolchain.weights.checkpoint import HUB, NOT_LOCAL, is_checkpoint, local_path

CALM = "float32"
"""The precision in which a VAE is safe."""


@dataclass(frozen=True)
class Wanted:
    """What a recipe is to be for, as a user says it; paths as seen from the working folder."""

    model: str
    target: str
    checkpoints: tuple[str, ...]
    """``component=LOCATION``, or one location of all components, or of the transformer."""
    device: str | None = None
    video: str = "68x192x192"
    """Frames, height and width."""


def recipe_text(wanted: Wanted, out: Path) -> str:
    """The text of a recipe ``out``.

    Raises:
        RecipeError: the model, the target or the device is unknown, or the recipe would not be one.
        CheckpointError: a checkpoint is not there.
    """
    plugins.registered(plugins.MODELS, wanted.model, "model", "--model")
    plugins.registered(plugins.TARGETS, wanted.target, "target", "--target")
    places = component_locations(wanted.checkpoints)
    frames, height, width = _video(wanted.video)
    lines = [
        "# Written by 'sora-compile init'. docs/recipe.md describes every key; '#' before one leaves it as by default.",
        "version: 1",
        f"name: {_scalar(out.stem)}",
        f"model: {_scalar(wanted.model)}",
        f"video: {{frames: {frames}, height: {height}, width: {width}, fps: 24}}",
        "sampler:",
        "  steps: 30",
        "  guidance: 7.0       # scale of classifier-free guidance",
        "  # leap: 15          # fewer denoiser calls: 15 ordinary steps, then one leap",
    ]
    for name, location in places.items():
        lines += [f"{name}:", f"  checkpoint: {_scalar(_from(location, out))}"]
        if name == "transformer":
            lines.append(f"  # passes: []        # installed: {', '.join(plugins.names(plugins.PASSES))}")
        if name == "vae" and find_target(wanted.target, {}).precision != CALM:
            lines.append(f"  precision: {CALM}  # this kind of VAE is known to overflow float16")
    lines += [f"target: {_scalar(wanted.target)}", *_device_lines(wanted.device, out)]
    lines += [
        "# memory_budget: 2.5GB  # for weights and activations; decides what is loaded when",
        "# gate: {mode: structure}  # execute one block of each kind, not every one: much faster for big models",
    ]
    text = "\n".join(lines) + "\n"
    parse_recipe(load_yaml(text))
    return text


def component_locations(given: Iterable[str]) -> dict[str, str]:
    """Locations by component, of what a user gave.

    Raises:
        RecipeError: a component is unknown or given twice, or there is no transformer.
        CheckpointError: a checkpoint is not there, or holds no weights.
    """
    found: dict[str, str] = {}
    for each in given:
        name, equals, location = each.partition("=")
        more = {name: location} if equals and name in COMPONENTS else _whole(each)
        for component, place in more.items():
            if component in found:
                raise RecipeError(f"--checkpoint {each}: the {component} has one already")
            if not place.startswith(HUB):
                local_path(place, Path())
            found[component] = place
    if "transformer" not in found:
        raise RecipeError("--checkpoint: there is no transformer; give a folder that has one, or transformer=LOCATION")
    return {name: found[name] for name in COMPONENTS if name in found}


def _whole(location: str) -> dict[str, str]:
    """The components of a folder that has them by name; or the transformer's own location."""
    if not location.startswith(HUB):
        folder = local_path(location, Path())
        inside = {n: f"{location.rstrip('/')}/{n}" for n in COMPONENTS if (folder / n).is_dir()}
        if inside:
            return inside
        if not is_checkpoint(location):
            raise CheckpointError(
                f"--checkpoint {location}: has neither weights nor a folder {', '.join(COMPONENTS)}; "
                "for one component, give it as transformer=LOCATION"
            )
    return {"transformer": location}


def _from(location: str, out: Path) -> str:
    """A location as a recipe ``out`` has it."""
    if location.startswith(NOT_LOCAL) or Path(location).expanduser().is_absolute():
        return location
    return os.path.relpath(location, out.parent)


def _device_lines(device: str | None, out: Path) -> list[str]:
    if device is None:
        return [f"# device: NAME          # one of {', '.join(shipped_devices())}, or a profile's path"]
    path = find_device(device)
    return [f"device: {_scalar(device if path in shipped_devices().values() else _from(device, out))}"]


def _video(text: str) -> list[int]:
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise RecipeError(f"--video {text}: expected FRAMESxHEIGHTxWIDTH, such as 68x192x192")
    return [int(part) for part in text.split("x")]


def _scalar(text: str) -> str:
    """A text as YAML has it in a line."""
    return str(yaml.dump(escaped([text]), Dumper=QuotingDumper, allow_unicode=True, width=1 << 20))[2:].rstrip("\n")
