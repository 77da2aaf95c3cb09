"""``schema``: the JSON Schemas of our files."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Annotated, Any

import typer


def schema(
    what: Annotated[str, typer.Argument(metavar="recipe|manifest|matrix", help="Which file's schema.")],
) -> None:
    """Print the JSON Schema of recipes, manifests or matrices of builds."""
    from toolchain.ui.console import Console

    with Console(as_json=True, verbose=False) as console:
        from toolchain.errors import RecipeError
        from toolchain.formats.extending import file_schema
        from toolchain.formats.manifest import Manifest
        from toolchain.formats.matrix import Matrix

        models: dict[str, Callable[[], dict[str, Any]]] = {
            "recipe": file_schema,
            "manifest": Manifest.model_json_schema,
            "matrix": Matrix.model_json_schema,
        }
        if what not in models:
            close = difflib.get_close_matches(what, models, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise RecipeError(f"schema {what}: expected 'recipe', 'manifest' or 'matrix'{hint}")
        console.answer(models[what](), None)
