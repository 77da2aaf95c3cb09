"""Builds that take nothing but what was locked: no network, and every input as it was."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from toolchain.build.inputs import other_files
from toolchain.errors import RecipeError
from toolchain.formats.extending import SHIPPED, RecipeSource
from toolchain.formats.lock import Lock, lock_path, read_lock
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import shipped
from toolchain.planning.resolve import ResolvedComponent, find_tokenizer, resolve_lightly
from toolchain.system.store import Store, digest
from toolchain.version import VERSION
from toolchain.weights.adapters import CONFIG_FILE
from toolchain.weights.checkpoint import HUB
from toolchain.weights.digests import checkpoint_digest, tensor_digests
from toolchain.weights.hub import offline

_PINNED = re.compile(r"hf://[^/]+/[^/@]+@[0-9a-f]{40}([/#].*)?")


@contextlib.contextmanager
def frozen(source: RecipeSource, recipe: Recipe, store: Store | None = None) -> Iterator[None]:
    """Hold everything that ``recipe`` names against its lock, and fetch nothing in the body.

    Args:
        source: the files that it is from; it may have overrides besides.

    Raises:
        RecipeError: there is no lock, a location on the hub is not pinned, or an input is another than was locked;
            names it.
        CheckpointError: a checkpoint is not there.
    """
    path = source.files[0]
    with offline():
        _check_pinned(recipe)
        _check_own(path)
        differences = list(read_lock(path).differences(make_lock(source, recipe, store)))
        if differences:
            raise RecipeError(
                f"{lock_path(path)}: not what was locked: {'; '.join(differences)}; if that is meant, write it anew "
                f"with 'sora-compile lock {path}'"
            )
        yield


def make_lock(source: RecipeSource, recipe: Recipe, store: Store | None = None) -> Lock:
    """The lock of a recipe as everything is now; checkpoints are read for it, unless the store knows their digests.

    Raises:
        RecipeError: a location on the hub is not pinned, or the recipe comes with the package.
        CheckpointError: a checkpoint is not there, cannot be fetched, or is damaged.
    """
    path, store = source.files[0], store or Store()
    _check_own(path)
    _check_pinned(recipe)
    build = resolve_lightly(recipe, path.parent)
    inputs: dict[str, str] = {}
    tools = {"sora-compile": VERSION, **build.target.versions()}
    for part in build.components.values():
        inputs |= _digests(part, store)
        tools |= part.target.versions()
    tokenizer = find_tokenizer(build)
    for file in other_files(build):
        inputs["text_encoder.tokenizer" if file == tokenizer else "device"] = digest(file)
    names = {file: f"{SHIPPED}{name}" for name, file in shipped().items()}
    recipes = {names.get(file) or os.path.relpath(file, path.parent): digest(file) for file in source.files}
    return Lock(recipes=recipes, env=dict(source.variables), inputs=inputs, tools=tools)


def _digests(part: ResolvedComponent, store: Store) -> dict[str, str]:
    """Digests of a component's weights and of the files that configure them, by the recipe's keys."""
    base, *adapters = part.checkpoint.layers()
    layers = {part.name: (base, "config.json")}
    layers |= {f"{part.name}.loras.{i}": (adapter, CONFIG_FILE) for i, adapter in enumerate(adapters)}
    found = {}
    for key, (layer, config) in layers.items():
        found[f"{key}.checkpoint"] = checkpoint_digest(tensor_digests(layer, store, part.name))
        file = layer.root / config
        if file.is_file() and not (layer is base and part.recipe.config is not None):
            found[f"{key}.config"] = digest(file)
    return found


def _check_pinned(recipe: Recipe) -> None:
    for name, part in recipe.components().items():
        named = {"checkpoint": part.checkpoint}
        named |= {f"loras.{i}.checkpoint": lora.checkpoint for i, lora in enumerate(part.loras)}
        for key, location in named.items():
            if location.startswith(HUB) and not _PINNED.fullmatch(location):
                raise RecipeError(
                    f"{name}.{key}: '{location}' is not pinned to a commit; give it as hf://owner/name@REVISION, with "
                    "the 40 hexadecimal digits of one"
                )


def _check_own(path: Path) -> None:
    if path in shipped().values():
        raise RecipeError(f"'{path.stem}' is a shipped recipe, which has no lock; extend it in a recipe of your own")
