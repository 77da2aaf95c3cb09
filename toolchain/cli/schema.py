"""``schema``: the JSON Schemas of our files."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

import typer


def schema(
    what: Annotated[str, typer.Argument(metavar="recipe|manifest", help="Which file's schema.")],
) -> None:
    """Print the JSON Schema of recipes or manifests."""
    from toolchain.ui.console import Console

    with Console(as_json=True, verbose=False) as console:
        from toolchain.errors import RecipeError
        from toolchain.formats.manifest import Manifest
        from toolchain.formats.recipe import Recipe

        models: dict[str, Any] = {"recipe": Recipe, "manifest": Manifest}
        if what not in models:
            close = difflib.get_close_matches(what, models, n=1)
            raise RecipeError(
                f"schema {what}: expected 'recipe' or 'manifest'" + (f"; did you mean '{close[0]}'?" if close else "")
            )
        console.answer(models[what].model_json_schema(), None)
