"""What comes with the package, as tables for people and as plain data for machines: recipes, profiles of devices."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table

from toolchain.formats.device import load_device, shipped_devices
from toolchain.formats.recipe_file import load_recipe, shipped
from toolchain.formats.yaml_text import first_comment
from toolchain.system.disk import readable_size


def recipes_json() -> list[dict[str, Any]]:
    """The shipped recipes, as plain data; ``about`` is what a file says of itself in its first line."""
    found = []
    for name, path in shipped().items():
        recipe = load_recipe(path)
        found.append(
            {
                "name": name,
                "model": recipe.model,
                "target": recipe.target.name,
                "device": recipe.device,
                "memory_budget_bytes": recipe.memory_budget,
                "components": list(recipe.components()),
                "video": recipe.video.model_dump(mode="json"),
                "about": first_comment(path),
            }
        )
    return found


def recipes_table(found: list[dict[str, Any]]) -> RenderableType:
    """The shipped recipes for people."""
    table = Table(Column("recipe", no_wrap=True), "target", "device", "components", "video", "about")
    for r in found:
        video = f"{r['video']['frames']} × {r['video']['width']}×{r['video']['height']}"
        table.add_row(r["name"], r["target"], r["device"] or "any", ", ".join(r["components"]), video, r["about"])
    return table


def devices_json() -> list[dict[str, Any]]:
    """The shipped profiles, as plain data; bytes and seconds, and of each number whether it is an estimate."""
    found = []
    for name, path in shipped_devices().items():
        profile = load_device(path).model_dump(mode="json")
        found.append(profile | {"name": name, "about": first_comment(path)})
    return found


def devices_table(found: list[dict[str, Any]]) -> RenderableType:
    """The shipped profiles for people: ``~`` marks an estimate."""
    table = Table(Column("device", no_wrap=True), "memory of an app", "loads", "computes", "about")
    for d in found:
        memory = f"{_mark(d['memory_bytes'])}{readable_size(d['memory_bytes']['value'])}"
        loads = f"{_mark(d['load_bytes_per_s'])}{readable_size(d['load_bytes_per_s']['value'])}/s"
        computes = (
            f"{t['precision']} on {t['engine']} {_mark(t['flops_per_s'])}{t['flops_per_s']['value'] / 1e9:g} GFLOP/s"
            for t in d["throughput"]
        )
        table.add_row(d["name"], memory, loads, "\n".join(computes), d["about"])
    return table


def _mark(figure: dict[str, Any]) -> str:
    return "~" if figure["estimate"] else ""
