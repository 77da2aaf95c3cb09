"""The lock beside a recipe: digests of all that a build reads, and versions of the tools, as they were when it was
written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from toolchain.errors import RecipeError
from toolchain.formats.recipe import Strict
from toolchain.formats.yaml_text import read_yaml
from toolchain.validation import explain

SHOWN_DIGITS = 12
"""Of a digest in a message."""


class Lock(Strict):
    """What a recipe's build was given."""

    version: Literal[1] = 1
    recipes: dict[str, str] = Field(description="sha256 of the recipe and of those that it extends, by path from here.")
    env: dict[str, str] = Field(description="The environment variables that they use, with their values.")
    inputs: dict[str, str] = Field(description="sha256 of what the recipe names, by its key.")
    tools: dict[str, str] = Field(description="Versions of sora-compile and of what decides artifacts' bytes.")

    def differences(self, found: Lock) -> Iterator[str]:
        """What is other than it was locked, each in words."""
        groups = (("", "recipes"), ("env.", "env"), ("", "inputs"), ("tools.", "tools"))
        for prefix, name in groups:
            own, other = getattr(self, name), getattr(found, name)
            for key in sorted(own.keys() | other.keys()):
                if own.get(key) != other.get(key):
                    yield f"{prefix}{key} (locked {_shown(own.get(key))}, found {_shown(other.get(key))})"

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def lock_path(recipe: Path) -> Path:
    """The lock's place: ``recipe.yaml.lock`` beside ``recipe.yaml``."""
    return recipe.with_name(f"{recipe.name}.lock")


def read_lock(recipe: Path) -> Lock:
    """The lock of a recipe.

    Raises:
        RecipeError: there is none, or it is none.
    """
    path = lock_path(recipe)
    if not path.is_file():
        raise RecipeError(f"{path}: there is no lock of '{recipe}'; write it with 'sora-compile lock {recipe}'")
    try:
        return Lock.model_validate(read_yaml(path))
    except ValidationError as e:
        raise RecipeError(f"{path}: {explain(e, Lock)}; write it anew with 'sora-compile lock {recipe}'") from e


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return f"{value[:SHOWN_DIGITS]}…" if len(value) == 64 else f"'{value}'"
