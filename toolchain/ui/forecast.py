"""What a build would do, as a table for people and as plain data for machines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.build.forecast import ComponentForecast, Forecast
from toolchain.system.disk import readable_size


def forecast_json(found: Forecast) -> dict[str, Any]:
    """A forecast as plain data."""
    return {
        "name": found.planned.recipe.name,
        "target": found.planned.target.name,
        "gate": found.planned.recipe.gate.mode,
        "up_to_date": found.up_to_date,
        "components": {name: asdict(part) for name, part in found.components.items()},
        "disk": {"bundle_bytes": found.bundle_bytes, "cache_bytes": found.cache_bytes, "free_bytes": found.free_bytes},
        "memory": {"process_bytes": found.memory_bytes, "free_bytes": found.free_memory_bytes},
    }


def forecast_table(found: Forecast) -> RenderableType:
    """A forecast for people."""
    if found.up_to_date:
        return Text(f"nothing to do: the bundle is up to date ({readable_size(found.bundle_bytes)})")
    columns = (
        "component",
        "blocks",
        "cached",
        "to make",
        "to lower",
        "to execute",
        "reads",
        "lowers",
        "writes",
        "memory",
    )
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column == "component" else "right")
    for name, part in found.components.items():
        counts = (part.blocks, part.cached, _to_make(part), part.to_lower, _at_most(part.to_execute))
        sizes = (part.read_bytes, part.lower_bytes, part.write_bytes, part.memory_bytes)
        table.add_row(name, *map(str, counts), *(readable_size(size) if size else "" for size in sizes))
    places = ", ".join(f"{readable_size(free)} free in '{place}'" for place, free in found.free_bytes.items())
    lines = [
        f"disk: {readable_size(found.bundle_bytes)} for the bundle, {readable_size(found.cache_bytes)} more for the "
        f"cache, which they share where the file system can; {places}",
        f"memory: about {readable_size(found.memory_bytes)} for each process; "
        f"{readable_size(found.free_memory_bytes)} free",
        *(f"to be fetched: {location}" for part in found.components.values() for location in part.fetch),
    ]
    if any(part.uncertain for part in found.components.values()):
        lines.append("?: known only when checkpoints are read, fetched or measured; counted as if nothing were cached")
    return Group(table, Text("\n".join(lines)))


def _to_make(part: ComponentForecast) -> str:
    return f"{part.to_make}{' ?' if part.uncertain else ''}"


def _at_most(count: int) -> str:
    return f"≤ {count}" if count else "0"
