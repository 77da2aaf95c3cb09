"""The files that a build reads, for whoever has to know when it is to be done again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from toolchain.formats.bundle import Bundle
from toolchain.formats.depfile import depfile_text
from toolchain.formats.device import UNSPECIFIED, find_device
from toolchain.formats.manifest import FILE_NAME
from toolchain.formats.recipe import Recipe
from toolchain.planning.resolve import ResolvedBuild, find_tokenizer, resolve_lightly
from toolchain.system.files import whole_file
from toolchain.weights.adapters import CONFIG_FILE
from toolchain.weights.checkpoint import INDEX_NAMES, Checkpoint

BESIDE = ("config.json", CONFIG_FILE, *INDEX_NAMES)
"""What is read beside weights, where it is there."""


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint and its adapters, with what is read beside them; on the hub those in the cache."""
    found = []
    for layer in checkpoint.layers():
        found += [*layer.files(), *(path for name in BESIDE if (path := layer.root / name).is_file())]
    return found


def other_files(build: ResolvedBuild) -> list[Path]:
    """What a build reads besides recipes and weights: the tokenizer and the device's profile."""
    tokenizer = find_tokenizer(build)
    device = find_device(build.recipe.device or UNSPECIFIED, build.base)
    return [device] if tokenizer is None else [tokenizer, device]


def write_depfile(path: Path, bundle: Bundle, recipe: Recipe, base: Path, others: Iterable[Path]) -> None:
    """Write what ``bundle`` was made from, for its manifest, and give this the time of now.

    A build of which nothing has changed leaves the bundle as it is; but Make and Ninja go by time, and would ask for it
    again for ever.

    Args:
        others: what was read besides what the recipe names: its own files, measured times.

    Raises:
        RecipeError: a path cannot be expressed.
        ResourceError: the depfile cannot be written.
    """
    build = resolve_lightly(recipe, base)
    files = [*others, *(f for part in build.components.values() for f in weight_files(part.checkpoint))]
    inputs = dict.fromkeys(str(file.absolute()) for file in (*files, *other_files(build)))
    manifest = bundle.path / FILE_NAME
    with whole_file(path, "--depfile") as partial:
        partial.write_text(depfile_text(str(manifest), inputs), encoding="utf-8", errors="surrogateescape")
        os.utime(manifest)
