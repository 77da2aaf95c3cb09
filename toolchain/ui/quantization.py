"""What a budget became: as a table, as plain data, and as a recipe file."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.build.budget import Chosen, Point, Settled
from toolchain.build.quantizing import Quantized
from toolchain.system.disk import readable_size
from toolchain.ui.recipe_text import recipe_text

NUMBER = re.compile(r"(?<![\w])\d+(?![\w])")


def settled_json(quantized: Quantized) -> list[dict[str, Any]]:
    """Budgets and what they became, as plain data."""
    return [_json(s) for s in quantized.settled]


def _json(s: Settled) -> dict[str, Any]:
    return {
        "components": list(s.components),
        "budget": s.budget.model_dump(mode="json", exclude_none=True),
        "bytes": s.bytes,
        "plain_bytes": s.plain_bytes,
        "expected_error": s.expected,
        "measured": {
            n: {"error": m.error, "sqnr_db": m.sqnr_db, "block_errors": dict(m.prices)} for n, m in s.measured.items()
        },
        "gap": s.gap,
        "weights": [
            {
                "component": c.item.component,
                "names": list(c.item.names),
                "address": c.item.address,
                "shape": list(c.item.source.shape),
                "stored": str(c.candidate),
                "bytes": c.bytes,
                "expected_error": c.error,
            }
            for c in s.chosen
        ],
        "curve": [{"bytes": p.bytes, "expected_error": p.error} for p in s.curve],
        "alike": [{"stored": p.name, "bytes": p.bytes, "expected_error": p.error} for p in s.alike],
    }


def settled_table(quantized: Quantized, every: bool = False) -> RenderableType:
    """Budgets and what they became, for people.

    Args:
        every: a row for each weight, not one for all that differ in their layer alone.
    """
    return Group(*(_table(s, every) for s in quantized.settled))


def _table(s: Settled, every: bool) -> RenderableType:
    table = Table(title=f"{', '.join(s.components)}, {s.budget}", title_justify="left")
    for column in ("weights", "stored as", "numbers", "bytes", "share of the error"):
        table.add_column(column, justify="left" if column in ("weights", "stored as") else "right")
    groups: dict[tuple[str, str], list[Chosen]] = {}
    for c in s.chosen:
        address = c.item.names[0] if every else NUMBER.sub("*", c.item.address)
        groups.setdefault((c.item.component, address), []).append(c)
    for (component, address), chosen in groups.items():
        kinds = Counter(str(c.candidate) for c in chosen).most_common()
        stored = ", ".join(f"{kind} ×{n}" if len(chosen) > 1 else kind for kind, n in kinds)
        name = f"{component}/{address}" if len(s.components) > 1 else address
        numbers = sum(math.prod(c.item.source.shape) * c.item.copies for c in chosen)
        share = sum(c.error for c in chosen) / s.expected if s.expected else 0.0
        size = readable_size(sum(c.bytes for c in chosen))
        table.add_row(Text(name), Text(stored), f"{numbers:,}", size, f"{share:.1%}")
    lines = [
        f"{s.bytes} bytes ({readable_size(s.bytes)}) of {readable_size(s.plain_bytes)} without quantization; "
        f"no other choice is expected to be better by more than {s.gap:.1g} of it",
        *(
            f"{name}: {found.sqnr_db:.2f} dB measured on its output; "
            f"largest relative error of a block {max(found.prices.values(), default=0.0):.2g}"
            for name, found in s.measured.items()
        ),
        f"{Point(s.bytes, s.expected).sqnr_db:.2f} dB were expected, by adding the errors of single weights",
    ]
    return Group(table, Text("\n".join(lines)))


def rules_file(quantized: Quantized, base: Path, out: Path) -> str:
    """The text of a recipe file that pins what was chosen.

    Args:
        base: folder that the recipe's relative checkpoints were looked for in.
        out: where the file is to be; relative checkpoints become absolute if they would not be found from there.
    """
    lines = [
        f"# Chosen by 'sora-compile quantize' for {', '.join(s.components)}, {s.budget}: {s.bytes} bytes, "
        + ", ".join(f"{n} {m.sqnr_db:.2f} dB" for n, m in s.measured.items())
        for s in quantized.settled
    ]
    return "\n".join([*lines, recipe_text(quantized.recipe, base, out)])
