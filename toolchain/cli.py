"""The ``sora-compile`` command. No logic: parses, calls the library, prints."""

from __future__ import annotations

import difflib
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _CompileByDefault(TyperGroup):
    """``sora-compile RECIPE …`` is ``sora-compile compile RECIPE …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {o for p in self.params for o in p.opts} | {"--help"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_CompileByDefault,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile Open-Sora text-to-video models into bundles for phones: [bold]sora-compile RECIPE -o BUNDLE[/bold].",
    rich_markup_mode="rich",
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's path, or the name of a shipped one (tiny, …).")
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe: sampler.steps=20.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")]
DirectOption = Annotated[
    bool, typer.Option("--direct", help="Lower every block by itself: the reference for stamping.")
]
PrintOption = Annotated[
    str | None,
    typer.Option("--print-after", metavar="PASS|all", help="Print the graph after a pass (capture, legalise, …)."),
]


JobsOption = Annotated[int, typer.Option("-j", "--jobs", metavar="N", min=1, help="Build in N processes at once.")]
GateOption = Annotated[
    str | None,
    typer.Option("--gate", metavar="MODE", help="every (default): execute each artifact; structure: one of each kind."),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Plan loading with these measured times; see calibrate."),
]
NoGateOption = Annotated[bool, typer.Option("--no-gate", help="Execute nothing; the manifest will say so.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from toolchain.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit


@app.command("compile")
def compile_(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The folder to write.")],
    overrides: SetOption = [],  # noqa: B006 - typer reads it
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    print_after: PrintOption = None,
    direct: DirectOption = False,
    jobs: JobsOption = 1,
    gate: GateOption = None,
    no_gate: NoGateOption = False,
    calibration: CalibrationOption = None,
) -> None:
    """Build a recipe into a bundle. (The default command.)"""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.errors import RecipeError
        from toolchain.formats.recipe_file import find_recipe

        if gate is not None and no_gate:
            raise RecipeError("--gate and --no-gate: choose one")
        mode = "none" if no_gate else gate
        with console.progress(print_after) as listener:
            path = find_recipe(recipe)
            loaded = toolchain.load_recipe(path, [*overrides, *([f"gate.mode={mode}"] if mode is not None else [])])
            listener.check_print_after(loaded)
            bundle = toolchain.compile_recipe(
                loaded,
                output,
                base=path.parent,
                listener=listener,
                direct=direct,
                jobs=jobs,
                calibration=calibration,
            )
        from toolchain.ui.tables import bundle_json, bundle_summary

        console.answer(bundle_json(bundle), bundle_summary(bundle))


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    print_after: PrintOption = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write it as a page.")] = None,
    calibration: CalibrationOption = None,
) -> None:
    """Show what would be built, what is loaded when, and what a video is predicted to take. Lowers nothing."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.formats.recipe_file import find_recipe

        if html is not None:
            from toolchain.ui.report.write import check_places

            check_places({"--html": html})
        with console.progress(print_after) as listener:
            path = find_recipe(recipe)
            loaded = toolchain.load_recipe(path, overrides)
            listener.check_print_after(loaded)
            planned = toolchain.plan(loaded, base=path.parent, listener=listener, calibration=calibration)
        if html is not None:
            from toolchain.ui.report.write import write_plan_report

            write_plan_report(planned, html)
        from toolchain.ui.tables import plan_json, plan_table

        console.answer(plan_json(planned), plan_table(planned))


@app.command()
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


@app.command()
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


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a bundle holds, after checking its files."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.ui.tables import bundle_json, bundle_table

        loaded = toolchain.load_bundle(bundle)
        loaded.check_files()
        console.answer(bundle_json(loaded), bundle_table(loaded))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="COMPONENT/BLOCK", help="Walk a block step by step; needs its checkpoint."),
    ] = None,
    goldens_of: Annotated[
        Path | None, typer.Option("--goldens-of", metavar="BUNDLE", help="Use another bundle's goldens.")
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a bundle's files, and run its artifacts against its goldens. Needs no checkpoint."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.ui.tables import explanation_json, verification_json, verification_table

        if explain is not None:
            from toolchain.accuracy.explain import explain_block
            from toolchain.build.calibration import calibrate_recipe

            found = explain_block(bundle, explain, calibrate=calibrate_recipe)
            console.answer(explanation_json(found), "\n\n".join(e.text() for e in found))
            return
        with console.progress(None) as listener:
            verified = toolchain.verify(bundle, goldens_of=goldens_of, listener=listener)
        console.answer(verification_json(verified), verification_table(verified))
        verified.require()


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="BUNDLE_A", help="A bundle's folder.")],
    b: Annotated[Path, typer.Argument(metavar="BUNDLE_B", help="Another's.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare two bundles: manifest, sizes, accuracy, and what their artifacts give."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.accuracy.diff import compare_bundles
        from toolchain.ui.tables import comparison_json, comparison_table

        found = compare_bundles(a, b)
        console.answer(comparison_json(found), comparison_table(found))


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="HTML", help="The page; BUNDLE.html if not given.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Show the timeline that play --trace recorded.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="PNG", help="Also draw the timeline alone.")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write one self-contained page about a bundle, after checking its files."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.ui.report.write import write_bundle_report

        loaded = toolchain.load_bundle(bundle)
        page = output or bundle.absolute().with_name(f"{bundle.absolute().name}.html")
        write_bundle_report(loaded, page, trace=trace, png=png)
        console.answer({"page": str(page)} | ({"png": str(png)} if png else {}), str(page))


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The calibration to write, in YAML.")],
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured; the median is taken.")] = 3,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure how long this machine takes to load and run what a bundle consists of."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.player.measuring import measure_times
        from toolchain.system.files import check_file, whole_file
        from toolchain.ui.loading import times_text

        check_file("-o", output)
        with console.stages() as progress:
            measured = measure_times(toolchain.load_bundle(bundle), repeats=repeats, progress=progress)
        with whole_file(output) as partial:
            partial.write_text(measured.to_yaml(), encoding="utf-8")
        console.answer(measured.model_dump(mode="json"), times_text(measured, output))


@app.command()
def replan(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    calibration: CalibrationOption = None,
    memory_budget: Annotated[
        str | None, typer.Option("--memory-budget", metavar="SIZE", help="For weights and activations, as 2.5GB.")
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Plan anew what a bundle loads when, and write it into its manifest. Builds nothing."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        from toolchain.build.replan import replan_bundle
        from toolchain.ui.loading import loading_json, loading_text
        from toolchain.validation import read_bytes

        budget = None if memory_budget is None else read_bytes(memory_budget, "--memory-budget")
        found = replan_bundle(bundle, calibration=calibration, memory_budget=budget).manifest
        said = found.loading, found.memory_budget_bytes
        console.answer(loading_json(*said), loading_text(*said))


@app.command()
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
        from toolchain.ui.tables import cache_json, cache_table

        if action not in ("show", "verify", "clear"):
            raise RecipeError(f"cache {action}: expected show, verify or clear")
        found = cache_json(Store(), action)
        console.answer(found, cache_table(found))


@app.command()
def play(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What the video shows.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="VIDEO", help="The .mp4 file to write.")],
    seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 64) - 1, help="Decides the initial noise.")] = 0,
    memory_budget: Annotated[
        str | None,
        typer.Option("--memory-budget", metavar="SIZE", help="Plan loading for this much memory instead, as 2.5GB."),
    ] = None,
    frames: Annotated[Path | None, typer.Option("--frames", metavar="FOLDER", help="Also write PNGs.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Also write a Chrome trace.")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a video of a prompt with nothing but a bundle."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.ui.playing import played_json, played_table, played_text
        from toolchain.validation import read_bytes

        budget = None if memory_budget is None else read_bytes(memory_budget, "--memory-budget")
        with console.stages() as progress:
            video = toolchain.play(
                bundle,
                prompt,
                output,
                seed=seed,
                memory_budget=budget,
                frames=frames,
                trace=trace,
                progress=progress,
                warn=console.warn,
            )
        console.note(played_text(video.played))
        if trace is not None and video.predicted is not None:
            console.note(played_table(video.played, video.predicted))
        console.answer(played_json(video), str(video.path))


@app.command()
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


def main() -> None:
    """Entry point of the command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so nothing half-written stays
    app()


if __name__ == "__main__":
    main()
