"""``build-all``: every build of a matrix, with one pool of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import (
    BuildTraceOption,
    EventsOption,
    ExecutorOption,
    GateOption,
    JobsOption,
    JsonOption,
    MemoryOption,
    VerboseOption,
)


def build_all(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX", help="A file of recipes and axes; see schema matrix.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    jobs: JobsOption = 1,
    executor: ExecutorOption = None,
    memory: MemoryOption = None,
    gate: GateOption = None,
    keep_going: Annotated[
        bool,
        typer.Option("-k", "--keep-going", help="Make the others when a build fails; ends as the first failure."),
    ] = False,
    events: EventsOption = None,
    trace: BuildTraceOption = None,
) -> None:
    """Make many bundles at once: recipes times checkpoints, devices, targets. What they share is built once."""
    from toolchain.ui.console import Console

    with Console(as_json, verbose, kept="bundles that are done stay, and so does what the cache has") as console:
        import toolchain
        from toolchain.ui.matrix import first_exit_code, outcomes_json, outcomes_table
        from toolchain.ui.spent import watched
        from toolchain.validation import read_bytes

        with watched(console, events, trace) as watch, console.progress(None, watch.listeners) as listener:
            outcomes = toolchain.build_all(
                matrix,
                listener=listener,
                jobs=jobs,
                executor=executor,
                memory_bytes=None if memory is None else read_bytes(memory, "--memory"),
                changes={} if gate is None else {"gate.mode": gate},
                keep_going=keep_going,
            )
        watch.say(console)
        console.answer(outcomes_json(outcomes) | watch.summary_json(), outcomes_table(outcomes))
        if code := first_exit_code(outcomes):
            raise SystemExit(code)
