"""Plans and bundles as tables for people and as plain data for machines."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.bundle import Bundle
from toolchain.describe import sampler
from toolchain.lowering import Lowering, Plan
from toolchain.manifest import BlockEntry
from toolchain.target import distinct_functions


def size(count: float) -> str:
    """Bytes for people: ``85.1 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def runs(rate: str) -> str:
    """How often a block runs, for people."""
    unit = {"chunk": "chunk of latents", "frames": "group of frames"}.get(rate, rate.replace("_", " "))
    return f"each {unit}"


def plan_json(planned: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    steps = sampler(planned.recipe).steps
    return {
        "name": planned.recipe.name,
        "target": planned.target.name,
        "denoiser_calls": len(steps),
        "merged_calls": sum(s.function == "merged" for s in steps),
        "components": {name: _component_json(c) for name, c in planned.components.items()},
    }


def _component_json(lowering: Lowering) -> dict[str, Any]:
    return {
        "precision": lowering.target.precision,
        "dims": dict(lowering.graphs[0].dims),
        "passes": [str(p) for p in lowering.passes],
        "parameters": lowering.parameters,
        "weight_bytes": int(lowering.parameters * lowering.bytes_per_weight),
        "distinct_structures": len({b.structure() for b in lowering.blocks}),
        "blocks": [
            {
                "name": b.name,
                "rate": b.rate,
                "resident": b.name in lowering.resident,
                "functions": list(distinct_functions(b)),
                "parameters": b.parameters,
                "weight_bytes": int(b.parameters * lowering.bytes_per_weight),
                "structure": b.structure(),
                "inputs": {p.name: {"shape": list(p.shape), "source": b.sources[p.name]} for p in b.inputs},
                "outputs": {p.name: {"shape": list(p.shape)} for p in b.outputs},
            }
            for b in lowering.blocks
        ],
    }


def plan_table(planned: Plan) -> RenderableType:
    """A plan for people."""
    data = plan_json(planned)
    groups: list[RenderableType] = []
    for name, component in data["components"].items():
        table = Table(title=f"{name}, in the order in which it runs", title_justify="left")
        for column in ("block", "runs", "functions", "parameters", "bytes", "structure", "in memory"):
            table.add_column(column, justify="right" if column in ("parameters", "bytes") else "left")
        for b in component["blocks"]:
            each = (
                f"{b['parameters']:,}",
                size(b["weight_bytes"]),
                b["structure"][:8],
                "kept" if b["resident"] else "loaded each time",
            )
            table.add_row(b["name"], runs(b["rate"]), ", ".join(b["functions"]), *each)
        groups.append(table)
        groups.append(
            Text(
                f"{component['parameters']:,} parameters, {size(component['weight_bytes'])} "
                f"of {component['precision']} in {len(component['blocks'])} blocks "
                f"of {component['distinct_structures']} structures"
            )
        )
    video, dims = planned.recipe.video, data["components"]["transformer"]["dims"]
    groups.append(
        Text(
            f"{video.frames} frames of {video.width}×{video.height} at {video.fps}/s: "
            f"latents {dims['T']}×{dims['H']}×{dims['W']}, {dims['N']} tokens; "
            f"{data['denoiser_calls']} denoiser calls, {data['merged_calls']} of them merged; "
            f"{planned.target.name}"
        )
    )
    return Group(*groups)


def bundle_json(bundle: Bundle) -> dict[str, Any]:
    """A bundle as plain data: its manifest, where it is and how large it is."""
    return {
        "bundle": str(bundle.path),
        "bytes": sum(f.bytes for f in bundle.files()),
        "manifest": bundle.manifest.model_dump(mode="json"),
    }


def bundle_summary(bundle: Bundle) -> RenderableType:
    """What a build ends with: the bundle's path on a line of its own, and a line about it."""
    m = bundle.manifest
    blocks = sum(len(c.blocks) for c in m.components.values())
    worst = max(
        (a.relative_error for c in m.components.values() for b in c.blocks for a in (b.accuracy or {}).values()),
        default=None,
    )
    proof = (
        f"all executed, largest relative error {worst:.2g}"
        if worst is not None
        else "interfaces checked, not executed here"
    )
    total = sum(f.bytes for f in bundle.files())
    return Text(f"{bundle.path}\n{m.target.name}: {blocks} blocks, {size(total)}; {proof}")


def bundle_table(bundle: Bundle) -> RenderableType:
    """A bundle for people."""
    m = bundle.manifest
    groups: list[RenderableType] = []
    for name, component in m.components.items():
        table = Table(title=f"{name}, {component.precision}, in the order in which it runs", title_justify="left")
        for column in ("block", "runs", "functions", "parameters", "bytes", "relative error", "inputs from"):
            table.add_column(column, justify="right" if column in ("parameters", "bytes") else "left")
        for b in component.blocks:
            sources = dict.fromkeys(i.source.split(".")[0] for i in b.inputs)
            figures = (f"{b.parameters:,}", size(sum(f.bytes for f in b.files)))
            table.add_row(b.name, runs(b.rate), ", ".join(b.functions), *figures, _errors(b), ", ".join(sources))
        groups.append(table)
    g, s = m.geometry, m.sampler
    leap = f", leap: {s.leap.kind}" if s.leap is not None else ""
    merged = sum(step.function == "merged" for step in s.steps)
    lines = [
        f"{m.name} ({m.model}), {m.target.name}, {size(sum(f.bytes for f in bundle.files()))}",
        f"{g.frames} frames of {g.width}×{g.height} at {g.fps}/s, "
        f"latents {g.latent_frames}×{g.latent_height}×{g.latent_width}",
        f"{len(s.steps)} denoiser calls, {merged} of them merged, guidance {s.guidance}{leap}",
        f"gate: {m.gate.mode}; built with {', '.join(f'{k} {v}' for k, v in m.tools.items())}",
    ]
    return Group(*groups, Text("\n".join(lines)))


def _errors(block: BlockEntry) -> str:
    if block.accuracy is None:
        return "not executed"
    return ", ".join(f"{a.relative_error:.2g}" for a in block.accuracy.values())
