"""``lock``: what a build reads, written down."""

from __future__ import annotations

from toolchain.cli.options import JsonOption, RecipeArgument, VerboseOption


def lock(recipe: RecipeArgument, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Write RECIPE.lock beside a recipe: digests of checkpoints and files, versions of tools. For --frozen."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.build.locking import make_lock
        from toolchain.formats.lock import lock_path
        from toolchain.formats.recipe_file import find_recipe, parse_source, recipe_source
        from toolchain.system.files import check_file, whole_file

        source = recipe_source(find_recipe(recipe))
        path = lock_path(source.files[0])
        check_file("lock", path)
        made = make_lock(source, parse_source(source))
        with whole_file(path, "lock") as partial:
            partial.write_text(made.to_json(), encoding="utf-8")
        said = f"{path}\n{len(made.inputs)} inputs, {len(made.recipes)} recipes, {len(made.tools)} tools"
        console.answer({"path": str(path), **made.model_dump(mode="json")}, said)
