"""``quantize`` and ``tune``: searches that give a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import JobsOption, JsonOption, RecipeArgument, SetOption, VerboseOption


def quantize(
    recipe: RecipeArgument,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="RECIPE", help="The recipe with rules that is to be written."),
    ],
    component: Annotated[
        str | None, typer.Option("--component", metavar="NAME", help="Choose for this one alone; all share the budget.")
    ] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Most bytes of all weights, as 1.2GB.")
    ] = None,
    sqnr_db: Annotated[
        float | None, typer.Option("--sqnr-db", metavar="DB", help="Least SQNR of each component's output.")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Ways to keep a weight: 'float int8 palette{bits=6}'.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Draw size against error into this file.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    jobs: JobsOption = 1,
) -> None:
    """Choose how each weight is kept under a budget of bytes or of error; without one, under the recipe's own."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.formats.recipe_file import find_recipe
        from toolchain.system.files import check_file, whole_file
        from toolchain.ui.curve import draw
        from toolchain.ui.quantization import rules_file, settled_json, settled_table

        check_file("-o", output)
        if plot is not None:
            check_file("--plot", plot)
        with console.progress(None) as listener:
            path = find_recipe(recipe)
            loaded = toolchain.load_recipe(path, overrides)
            asked = {"bytes": bytes_, "sqnr_db": sqnr_db}
            found = toolchain.quantize(
                loaded,
                base=path.parent,
                component=component,
                budget={k: v for k, v in asked.items() if v is not None},
                candidates=candidates,
                listener=listener,
                jobs=jobs,
            )
        with whole_file(output) as partial:
            partial.write_text(rules_file(found, path.parent, output), encoding="utf-8")
        if plot is not None:
            with whole_file(plot, "--plot") as partial:
                draw(found.settled, partial)
        console.answer(settled_json(found), settled_table(found, verbose))


def tune(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="RECIPE", help="The recipe with the chosen schedule; needs a goal."),
    ] = None,
    latency: Annotated[
        float | None, typer.Option("--latency", metavar="SECONDS", help="Choose the best that takes at most so long.")
    ] = None,
    quality: Annotated[
        float | None, typer.Option("--quality", metavar="DB", help="Choose the fastest that promises this PSNR.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Predict for this memory budget, as 2.5GB.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts to try schedules on, one a line.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=1 << 63, help="Of the first video; others count on.")] = 0,
    points: Annotated[int, typer.Option("--points", min=1, help="At how many times to look for schedules.")] = 12,
    front: Annotated[
        Path | None, typer.Option("--front", metavar="PNG", help="Draw time against quality into this file.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Search for schedules: which steps compute everything, and which reuse what earlier ones computed."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.errors import RecipeError
        from toolchain.formats.recipe_file import find_recipe
        from toolchain.system.files import check_file, read_lines, whole_file
        from toolchain.ui.front import draw_front
        from toolchain.ui.tuning import tuned_file, tuned_json, tuned_table
        from toolchain.validation import read_bytes

        if output is not None and latency is None and quality is None:
            raise RecipeError(f"-o {output}: nothing is chosen without a goal; give --latency or --quality")
        for option, file in (("-o", output), ("--front", front)):
            if file is not None:
                check_file(option, file)
        lines = None if prompts is None else read_lines("--prompts", prompts)
        with console.progress(None) as listener:
            path = find_recipe(recipe)
            found = toolchain.tune(
                toolchain.load_recipe(path, overrides),
                base=path.parent,
                latency_s=latency,
                quality_db=quality,
                memory_bytes=None if memory is None else read_bytes(memory, "--memory"),
                prompts=lines,
                seed=seed,
                points=points,
                listener=listener,
            )
        if output is not None:
            with whole_file(output) as partial:
                partial.write_text(tuned_file(found, path.parent, output), encoding="utf-8")
        if front is not None:
            with whole_file(front, "--front") as partial:
                draw_front(found, partial)
        console.answer(tuned_json(found), tuned_table(found))
