"""``compile`` and ``plan``: a recipe becomes a bundle, or what it would become."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import (
    BuildTraceOption,
    CalibrationOption,
    DepfileOption,
    DryRunOption,
    EventsOption,
    ExecutorOption,
    FrozenOption,
    GateOption,
    JobsOption,
    JsonOption,
    MemoryOption,
    PrintOption,
    RecipeArgument,
    SetOption,
    VerboseOption,
)

DirectOption = Annotated[
    bool, typer.Option("--direct", help="Lower every block by itself: the reference for stamping.")
]
NoGateOption = Annotated[bool, typer.Option("--no-gate", help="Execute nothing; the manifest will say so.")]


def compile_(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The folder to write.")],
    overrides: SetOption = [],  # noqa: B006 - typer reads it
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    print_after: PrintOption = None,
    direct: DirectOption = False,
    jobs: JobsOption = 1,
    executor: ExecutorOption = None,
    memory: MemoryOption = None,
    gate: GateOption = None,
    no_gate: NoGateOption = False,
    calibration: CalibrationOption = None,
    events: EventsOption = None,
    trace: BuildTraceOption = None,
    depfile: DepfileOption = None,
    freeze: FrozenOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Build a recipe into a bundle. (The default command.)"""
    from toolchain.ui.console import Console

    with Console(as_json, verbose) as console:
        import toolchain
        from toolchain.errors import RecipeError
        from toolchain.formats.recipe_file import find_recipe, parse_source, recipe_source
        from toolchain.system.files import check_file
        from toolchain.system.read_only import ReadOnlyStore
        from toolchain.ui.bundles import bundle_json, bundle_summary
        from toolchain.ui.spent import watched
        from toolchain.validation import read_bytes

        if gate is not None and no_gate:
            raise RecipeError("--gate and --no-gate: choose one")
        if freeze and calibration is not None:
            raise RecipeError("--frozen and --calibration: measured times have no place in a lock; choose one")
        written = {"--events": events, "--trace": trace, "--depfile": depfile}
        if dry_run and (option := next((o for o, path in written.items() if path is not None), None)):
            raise RecipeError(f"--dry-run and {option}: nothing is built and nothing written; choose one")
        if depfile is not None:
            check_file("--depfile", depfile)
        mode = "none" if no_gate else gate
        with (
            watched(console, events, trace) as watch,
            console.progress(print_after, watch.listeners) as listener,
            contextlib.ExitStack() as held,
        ):
            path = find_recipe(recipe)
            source = recipe_source(path)
            loaded = parse_source(source, [*overrides, *([f"gate.mode={mode}"] if mode is not None else [])])
            listener.check_print_after(loaded)
            if freeze:
                from toolchain.build.locking import frozen

                held.enter_context(frozen(source, loaded, ReadOnlyStore() if dry_run else None))
            if dry_run:
                from toolchain.build.forecast import forecast
                from toolchain.ui.forecast import forecast_json, forecast_table

                found = forecast(
                    loaded, output, base=path.parent, listener=listener, direct=direct, calibration=calibration
                )
                console.answer(forecast_json(found), forecast_table(found))
                return
            bundle = toolchain.compile_recipe(
                loaded,
                output,
                base=path.parent,
                listener=listener,
                direct=direct,
                jobs=jobs,
                executor=executor,
                memory_bytes=None if memory is None else read_bytes(memory, "--memory"),
                calibration=calibration,
            )
            if depfile is not None:
                from toolchain.build.inputs import write_depfile
                from toolchain.formats.lock import lock_path

                others = [
                    *source.files,
                    *([lock_path(path)] if freeze else []),
                    *([calibration] if calibration else []),
                ]
                write_depfile(depfile, bundle, loaded, path.parent, others)
        watch.say(console)
        console.answer(bundle_json(bundle) | watch.summary_json(), bundle_summary(bundle))


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
        from toolchain.ui.planning import plan_json, plan_table

        console.answer(plan_json(planned), plan_table(planned))
