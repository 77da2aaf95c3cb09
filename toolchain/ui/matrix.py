"""What became of the builds of a matrix, for people and machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from toolchain.system.disk import readable_size
from toolchain.ui.bundles import proof
from toolchain.ui.console import explained

if TYPE_CHECKING:
    from rich.console import RenderableType

    from toolchain.build.matrix import Outcome


def first_exit_code(outcomes: Sequence[Outcome]) -> int:
    """Of the first build that failed; 0 if none did."""
    return next((explained(o.error)[0] for o in outcomes if o.error is not None), 0)


def outcomes_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Builds as plain data, in order; what each chose, and its bundle or its error."""
    return {"builds": [_outcome(o) for o in outcomes], "exit_code": first_exit_code(outcomes)}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    said: dict[str, Any] = {"bundle": outcome.name, "choices": dict(outcome.choices)}
    if outcome.bundle is None:
        code, line = explained(outcome.error)
        return said | {"error": line, "exit_code": code}
    manifest = outcome.bundle.manifest
    return said | {
        "bytes": sum(f.bytes for f in outcome.bundle.files()),
        "target": manifest.target.name,
        "gate": manifest.gate.mode,
    }


def outcomes_table(outcomes: Sequence[Outcome]) -> RenderableType:
    """A line a build: its folder, target, size and what was executed of it, or that it failed."""
    table = Table(box=None, pad_edge=False)
    for heading in ("bundle", "target", "size", ""):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for outcome in outcomes:
        if outcome.bundle is None:
            table.add_row(outcome.name, "", "", "FAILED")
        else:
            manifest, size = outcome.bundle.manifest, sum(f.bytes for f in outcome.bundle.files())
            table.add_row(outcome.name, manifest.target.name, readable_size(size), proof(manifest))
    return table
