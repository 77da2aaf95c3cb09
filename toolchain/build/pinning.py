"""What makes a bundle reproducible: its recipe with nothing left open, and the tokenizer that goes with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.build.entries import plain
from toolchain.errors import CheckpointError
from toolchain.formats.bundle import describe_file
from toolchain.formats.manifest import File
from toolchain.formats.recipe import ComponentRecipe, Recipe
from toolchain.planning.plan import Plan
from toolchain.planning.resolve import ResolvedBuild, find_tokenizer
from toolchain.system.store import Store
from toolchain.weights.checkpoint import HUB, Checkpoint
from toolchain.weights.digests import checkpoint_digest, tensor_digests

TOKENIZER_FILE = "spiece.model"


def pin(checkpoint: Checkpoint, part: ComponentRecipe, store: Store) -> dict[str, Any]:
    """What pins a component's weights, as a recipe has it: where they are, and of local ones the digest.

    Raises:
        CheckpointError: the recipe expects other content.
    """
    base, *adapters = checkpoint.layers()
    pinned = {"checkpoint": base.location, "sha256": _pin(base, part.sha256, store)}
    loras = [
        lora.model_dump() | {"checkpoint": adapter.location, "sha256": _pin(adapter, lora.sha256, store)}
        for lora, adapter in zip(part.loras, adapters, strict=True)
    ]
    return {**pinned, "loras": loras}


def _pin(checkpoint: Checkpoint, expected: str | None, store: Store) -> str | None:
    """The digest of a local checkpoint; a remote one has its commit in its location."""
    if checkpoint.location.startswith(HUB):
        return None
    found = checkpoint_digest(tensor_digests(checkpoint, store))
    if expected not in (None, found):
        raise CheckpointError(
            f"checkpoint '{checkpoint.location}' has sha256 {found}, the recipe expects {expected}; "
            "use the checkpoint that the recipe was made for, or remove its sha256"
        )
    return found


def pinned_recipe(planned: Plan, pins: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe with nothing left open: configurations written out, checkpoints pinned, passes as they ran."""
    data = planned.recipe.model_dump(mode="json")
    for name, component in planned.components.items():
        data[name] |= {
            **pins[name],
            "config": plain(component.definition.config),
            "precision": component.target.precision,
            "passes": [{p.name: p.config.written(defaults=True)} for p in component.passes],
        }
    data["target"] = {"name": planned.target.name, **planned.target.config.model_dump(mode="json")}
    return Recipe.model_validate(data)


def copy_tokenizer(build: ResolvedBuild, folder: Path) -> File | None:
    """Put the tokenizer into a bundle.

    Raises:
        CheckpointError: as :func:`find_tokenizer`.
    """
    source = find_tokenizer(build)
    if source is None:
        return None
    place = folder / "text_encoder" / TOKENIZER_FILE
    place.parent.mkdir()
    shutil.copyfile(source, place)
    return describe_file(place, folder)
