"""A recipe that a command chose, as the text of a file."""

from __future__ import annotations

from pathlib import Path

from toolchain.build.tasks import NOT_LOCAL
from toolchain.formats.recipe import Recipe
from toolchain.weights.checkpoint import local_path


def recipe_text(recipe: Recipe, base: Path, out: Path) -> str:
    """The text of a file ``out`` with everything written out.

    Args:
        base: folder that the recipe's relative checkpoints were looked for in.
        out: where the file is to be; relative checkpoints become absolute if they would not be found from there.
    """
    data = recipe.model_dump(mode="json")
    for name, part in recipe.components().items():
        if not part.checkpoint.startswith(NOT_LOCAL):
            found = local_path(part.checkpoint, base).absolute()
            if not (out.absolute().parent / part.checkpoint).exists():
                data[name]["checkpoint"] = str(found)
    return Recipe.model_validate(data).to_yaml()
