"""Plans as tables for people and as plain data for machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.build.entries import bytes_by_storage
from toolchain.formats.loading import loads_of
from toolchain.ir.target import distinct_functions
from toolchain.planning.plan import ComponentPlan, Plan
from toolchain.planning.video import decoding_stages
from toolchain.system.disk import readable_size
from toolchain.ui.loading import loading_json, loading_text, loads_text
from toolchain.ui.phrases import by_storage, merged_calls, runs, tiled_text


def plan_json(planned: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    steps = planned.steps
    loading = planned.loading.entry()
    loads = loads_of(loading.plan)
    return {
        "name": planned.recipe.name,
        "target": planned.target.name,
        "denoiser_calls": len(steps),
        "merged_calls": merged_calls(steps),
        "reusing_calls": sum(s.reuse is not None for s in steps),
        "conditional_calls": sum(s.guidance == "conditional" for s in steps),
        "tiles": [s.tiles.model_dump(mode="json") for s in decoding_stages(planned.resolved) if s.tiles is not None],
        "loading": loading_json(loading, planned.loading.budget_bytes),
        "components": {name: _component_json(c, loads) for name, c in planned.components.items()},
    }


def _component_json(plan: ComponentPlan, loads: Mapping[str, int]) -> dict[str, Any]:
    return {
        "precision": plan.target.precision,
        "dims": dict(plan.graphs[0].dims),
        "passes": str(plan.passes),
        "parameters": plan.parameters,
        "weight_bytes": plan.weight_bytes,
        "bytes_by_storage": bytes_by_storage(plan.blocks),
        "distinct_structures": len({b.structure() for b in plan.blocks}),
        "blocks": [
            {
                "name": b.name,
                "rate": b.rate,
                "loads": loads.get(f"{plan.name}/{b.name}", 0),
                "functions": list(distinct_functions(b)),
                "parameters": b.parameters,
                "weight_bytes": b.weight_bytes,
                "bytes_by_storage": bytes_by_storage([b]),
                "memory": {
                    f: {
                        "weights": plan.memory[b.name].weights,
                        "activations": p.bytes,
                        "ports": p.ports,
                        "waiting": plan.memory[b.name].waiting,
                        "operator": p.operator,
                    }
                    for f, p in plan.memory[b.name].peaks.items()
                },
                "structure": b.structure(),
                "inputs": {p.name: {"shape": list(p.shape), "source": b.sources[p.name]} for p in b.inputs},
                "outputs": {p.name: {"shape": list(p.shape)} for p in b.outputs},
            }
            for b in plan.blocks
        ],
    }


def plan_table(planned: Plan) -> RenderableType:
    """A plan for people."""
    data = plan_json(planned)
    groups: list[RenderableType] = []
    for name, component in data["components"].items():
        table = Table(title=f"{name}, in the order in which it runs", title_justify="left")
        for column in ("block", "runs", "functions", "parameters", "bytes", "activations", "structure", "loaded"):
            table.add_column(column, justify="right" if column in ("parameters", "bytes", "activations") else "left")
        for b in component["blocks"]:
            each = (
                f"{b['parameters']:,}",
                readable_size(b["weight_bytes"]),
                readable_size(max(f["activations"] for f in b["memory"].values())),
                b["structure"][:8],
                loads_text(b["loads"]),
            )
            table.add_row(b["name"], runs(b["rate"]), ", ".join(b["functions"]), *each)
        groups.append(table)
        groups.append(
            Text(
                f"{component['parameters']:,} parameters, {readable_size(component['weight_bytes'])} "
                f"({by_storage(component['bytes_by_storage'])}) in {len(component['blocks'])} blocks "
                f"of {component['distinct_structures']} structures\n"
                f"{_most(planned.components[name])}"
            )
        )
    tiles = "".join(f"{said}\n" for said in tiled_text(decoding_stages(planned.resolved)))
    video, dims = planned.recipe.video, data["components"]["transformer"]["dims"]
    groups.append(
        Text(
            f"{video.frames} frames of {video.width}×{video.height} at {video.fps}/s: "
            f"latents {dims['T']}×{dims['H']}×{dims['W']}, {dims['N']} tokens; "
            f"{data['denoiser_calls']} denoiser calls, {data['merged_calls']} of them merged; "
            f"{planned.target.name}\n{tiles}{loading_text(planned.loading.entry(), planned.loading.budget_bytes)}"
        )
    )
    return Group(*groups)


def _most(plan: ComponentPlan) -> str:
    """The block that needs most memory while it runs, in a line."""
    name, most = max(plan.memory.items(), key=lambda kv: kv[1].total)
    return (
        f"at most {readable_size(most.total)} at once in '{name}', function '{most.function}': weights "
        f"{readable_size(most.weights)}, activations {readable_size(most.total - most.weights)}; others are beside"
    )
