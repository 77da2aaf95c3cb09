"""A recipe that a command chose, as the text of a file."""

from __future__ import annotations

from pathlib import Path

from toolchain.formats.recipe import Recipe
from toolchain.weights.checkpoint import absolute_location, split_choice


def recipe_text(recipe: Recipe, base: Path, out: Path) -> str:
    """The text of a file ``out`` with everything written out.

    Args:
        base: folder that the recipe's relative checkpoints were looked for in.
        out: where the file is to be; relative checkpoints become absolute if they would not be found from there.
    """

    def place(location: str) -> str:
        found = absolute_location(location, base)
        there = found == location or (out.absolute().parent / split_choice(location)[0]).exists()
        return location if there else found

    return recipe.located(place).to_yaml()
