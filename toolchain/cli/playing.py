"""A bundle at work: ``play``, and when what is loaded: ``calibrate``, ``replan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import BundleArgument, CalibrationOption, JsonOption, VerboseOption


def calibrate(
    bundle: BundleArgument,
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


def replan(
    bundle: BundleArgument,
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


def play(
    bundle: BundleArgument,
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
