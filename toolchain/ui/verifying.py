"""What ``verify`` and ``diff`` found, as tables for people and as plain data for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.system.disk import readable_size

if TYPE_CHECKING:
    from toolchain.accuracy.diff import Comparison
    from toolchain.accuracy.verify import Verification
    from toolchain.accuracy.walk import Explanation


def verification_json(found: Verification) -> dict[str, Any]:
    """What ``verify`` found, as plain data."""
    return {
        "bundle": str(found.bundle),
        "passed": not found.failed,
        "checks": [asdict(c) | {"passed": c.passed} for c in found.checks],
        "unchecked": list(found.unchecked),
    }


def verification_table(found: Verification) -> RenderableType:
    """What ``verify`` found, for people."""
    table = Table(title=f"{found.bundle} against its goldens", title_justify="left")
    for column in ("block", "function", "now", "when built", "limit", "quantization", ""):
        table.add_column(column, justify="left" if column in ("block", "function", "") else "right")
    for c in found.checks:
        unit = " dB" if not c.function else ""
        figures = (f"{v:.3g}{unit}" for v in (c.now, c.built, c.limit))
        price = "" if c.price is None else f"{c.price:.3g}"
        table.add_row(f"{c.component}/{c.block}", c.function, *figures, price, "ok" if c.passed else "FAILED")
    lines = [f"{len(found.checks)} checks, {len(found.failed)} failed; all files are what was built"]
    if found.unchecked:
        lines.append(f"{len(found.unchecked)} blocks have no goldens: another of their structure was executed")
    return Group(table, Text("\n".join(lines)))


def explanation_json(found: Sequence[Explanation]) -> list[dict[str, Any]]:
    """What ``verify --explain`` found, as plain data."""
    return [json_safe(asdict(e)) for e in found]


def json_safe(value: Any) -> Any:
    """``value`` with infinities and not-a-numbers as text, which JSON has none of."""
    if isinstance(value, Mapping):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def comparison_json(found: Comparison) -> dict[str, Any]:
    """Two bundles compared, as plain data."""
    data: dict[str, Any] = json_safe(asdict(found))
    return data | {"a": str(found.a), "b": str(found.b), "same": found.same}


def comparison_table(found: Comparison) -> RenderableType:
    """Two bundles compared, for people."""
    if found.same:
        return Text(f"{found.a} and {found.b} are the same")
    groups: list[RenderableType] = []
    if found.differences:
        table = Table("manifest", str(found.a), str(found.b))
        for d in found.differences:
            table.add_row(d.key, str(d.a), str(d.b))
        groups.append(table)
    changed = [b for b in found.blocks if not b.same]
    if changed:
        table = Table("block", "bytes", "relative error", "of quantization", "outputs, B against A")
        for b in changed:
            both = ((b.a_error, b.b_error), (b.a_price, b.b_price))
            errors = (" → ".join("-" if e is None else f"{e:.2g}" for e in pair) for pair in both)
            outputs = b.reason if b.outputs is None else ", ".join(f"{f} {e:.2g}" for f, e in b.outputs.items())
            table.add_row(b.block, f"{readable_size(b.a_bytes)} → {readable_size(b.b_bytes)}", *errors, outputs)
        groups.append(table)
    same = len(found.blocks) - len(changed)
    groups.append(Text(f"{len(changed)} blocks differ, {same} are the same byte for byte"))
    return Group(*groups)
