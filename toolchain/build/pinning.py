"""What makes a bundle reproducible: its recipe with nothing left open, and the tokenizer that goes with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from toolchain.build.entries import plain
from toolchain.errors import CheckpointError
from toolchain.formats.bundle import describe_file
from toolchain.formats.manifest import File
from toolchain.formats.recipe import Recipe
from toolchain.planning.plan import Plan
from toolchain.planning.resolve import ResolvedBuild, find_tokenizer
from toolchain.system.store import Store
from toolchain.weights.checkpoint import Checkpoint
from toolchain.weights.digests import checkpoint_digest, tensor_digests

TOKENIZER_FILE = "spiece.model"


def pin(checkpoint: Checkpoint, expected: str | None, store: Store) -> str | None:
    """What pins a checkpoint besides its location: the digest of a local one; a remote one has its commit.

    Raises:
        CheckpointError: the recipe expects other content.
    """
    if checkpoint.location.startswith("hf://"):
        return None
    found = checkpoint_digest(tensor_digests(checkpoint, store))
    if expected not in (None, found):
        raise CheckpointError(
            f"checkpoint '{checkpoint.location}' has sha256 {found}, the recipe expects {expected}; "
            "use the checkpoint that the recipe was made for, or remove its sha256"
        )
    return found


def pinned_recipe(planned: Plan, pins: Mapping[str, str | None]) -> Recipe:
    """The recipe with nothing left open: configurations written out, checkpoints pinned, passes as they ran."""
    data = planned.recipe.model_dump(mode="json")
    for name, component in planned.components.items():
        data[name] |= {
            "checkpoint": component.resolved.checkpoint.location,
            "sha256": pins[name],
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
