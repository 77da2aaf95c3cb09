"""``cache``: the store of what was built."""

from __future__ import annotations

from typing import Annotated

import typer

from toolchain.cli.options import JsonOption, VerboseOption


def cache(
    action: Annotated[str, typer.Argument(metavar="show|verify|clear", help="What to do with it.")] = "show",
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show, verify or clear the store of templates, artifacts and gate results."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.errors import RecipeError
        from toolchain.system.store import Store
        from toolchain.ui.cache import cache_json, cache_table

        if action not in ("show", "verify", "clear"):
            raise RecipeError(f"cache {action}: expected show, verify or clear")
        found = cache_json(Store(), action)
        console.answer(found, cache_table(found))
