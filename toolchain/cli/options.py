"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's path, or the name of a shipped one (tiny, …).")
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe: sampler.steps=20.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")]
PrintOption = Annotated[
    str | None,
    typer.Option("--print-after", metavar="PASS|all", help="Print the graph after a pass (capture, legalise, …)."),
]
JobsOption = Annotated[int, typer.Option("-j", "--jobs", metavar="N", min=1, help="Build in N processes at once.")]
ExecutorOption = Annotated[
    str | None,
    typer.Option("--executor", metavar="WHERE", help="local (default), or dask://HOST:PORT: a cluster's scheduler."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="What --jobs may use together; what is free if absent."),
]
GateOption = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="MODE",
        help="every (default): execute each artifact; release: all its functions; structure: one of each kind.",
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Plan loading with these measured times; see calibrate."),
]
EventsOption = Annotated[
    Path | None, typer.Option("--events", metavar="FILE", help="Write what is done, as it happens, as JSON lines.")
]
BuildTraceOption = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Also write a Chrome trace of the build.")
]
DepfileOption = Annotated[
    Path | None,
    typer.Option("--depfile", metavar="FILE", help="Write the files that the bundle depends on, for Make and Ninja."),
]
FrozenOption = Annotated[
    bool, typer.Option("--frozen", help="Fetch nothing, and refuse what is not as the recipe's lock has it; see lock.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and what it needs; write nothing, fetch nothing.")
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")]
