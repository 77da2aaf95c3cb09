"""``recipes`` and ``devices``: what comes with the package."""

from __future__ import annotations

from toolchain.cli.options import JsonOption, VerboseOption


def recipes(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """List the recipes that are shipped: give one's name in the place of a path."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.ui.shipped import recipes_json, recipes_table

        found = recipes_json()
        console.answer(found, recipes_table(found))


def devices(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """List the profiles of devices that are shipped: for ``device`` in a recipe."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.ui.shipped import devices_json, devices_table

        found = devices_json()
        console.answer(found, devices_table(found))
