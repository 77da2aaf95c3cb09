"""Plans and bundles as tables for people and as plain data for machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.build.entries import bytes_by_storage
from toolchain.formats.bundle import Bundle
from toolchain.formats.calls import Step
from toolchain.formats.loading import loads_of
from toolchain.formats.manifest import BlockEntry, Component, Manifest
from toolchain.formats.sampling import SamplerEntry
from toolchain.formats.schedule import MERGED
from toolchain.ir.functions import conditional, ungrouped
from toolchain.ir.target import distinct_functions
from toolchain.planning.plan import ComponentPlan, Plan
from toolchain.system.disk import readable_size
from toolchain.ui.loading import loading_json, loading_text, loads_text

if TYPE_CHECKING:
    from toolchain.accuracy.diff import Comparison
    from toolchain.accuracy.verify import Verification
    from toolchain.accuracy.walk import Explanation
    from toolchain.system.store import Store


def runs(rate: str) -> str:
    """How often a block runs, for people."""
    unit = {"chunk": "chunk of latents", "frames": "group of frames"}.get(rate, rate.replace("_", " "))
    return f"each {unit}"


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
    video, dims = planned.recipe.video, data["components"]["transformer"]["dims"]
    groups.append(
        Text(
            f"{video.frames} frames of {video.width}×{video.height} at {video.fps}/s: "
            f"latents {dims['T']}×{dims['H']}×{dims['W']}, {dims['N']} tokens; "
            f"{data['denoiser_calls']} denoiser calls, {data['merged_calls']} of them merged; "
            f"{planned.target.name}\n{loading_text(planned.loading.entry(), planned.loading.budget_bytes)}"
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


def bundle_json(bundle: Bundle) -> dict[str, Any]:
    """A bundle as plain data: its manifest, where it is and how large it is."""
    return {
        "bundle": str(bundle.path),
        "bytes": sum(f.bytes for f in bundle.files()),
        "components": {name: _sizes(c) for name, c in bundle.manifest.components.items()},
        "manifest": bundle.manifest.model_dump(mode="json"),
    }


def _sizes(component: Component) -> dict[str, Any]:
    """Bytes of a component: of its weights by how they are stored, and of the artifacts that hold them."""
    stored: Counter[str] = Counter()
    for block in component.blocks:
        stored.update(block.weight_bytes)
    return {
        "parameters": sum(b.parameters for b in component.blocks),
        "bytes_by_storage": dict(sorted(stored.items())),
        "artifact_bytes": sum(f.bytes for b in component.blocks for f in b.files),
    }


def bundle_summary(bundle: Bundle) -> RenderableType:
    """What a build ends with: the bundle's path on a line of its own, and a line about it."""
    m = bundle.manifest
    blocks = sum(len(c.blocks) for c in m.components.values())
    total = sum(f.bytes for f in bundle.files())
    return Text(f"{bundle.path}\n{m.target.name}: {blocks} blocks, {readable_size(total)}; {proof(m)}")


def proof(m: Manifest) -> str:
    """What was executed, in a few words."""
    every = [a for c in m.components.values() for b in c.blocks for a in (b.accuracy or {}).values()]
    worst = max((a.relative_error for a in every), default=0.0)
    what = {
        "every": f"all executed, largest relative error {worst:.2g}",
        "structure": "one of each structure executed, the others' weights checked",
        "none": "NOT executed, as asked for",
        "interface": "interfaces checked, not executed here",
    }[m.gate.mode]
    return what + (f", video {m.golden.psnr_db:.1f} dB" if m.golden is not None else "")


def bundle_table(bundle: Bundle) -> RenderableType:
    """A bundle for people."""
    m = bundle.manifest
    groups: list[RenderableType] = []
    for name, component in m.components.items():
        table = Table(title=f"{name}, {component.precision}, in the order in which it runs", title_justify="left")
        for column in (
            "block",
            "runs",
            "functions",
            "parameters",
            "bytes",
            "activations",
            "stored as",
            "relative error",
            "inputs from",
        ):
            table.add_column(column, justify="right" if column in ("parameters", "bytes", "activations") else "left")
        for b in component.blocks:
            sources = dict.fromkeys(i.source.split(".")[0] for i in b.inputs)
            peak = readable_size(max(m.activations for m in b.memory.values())) if b.memory else ""
            size = readable_size(sum(f.bytes for f in b.files))
            figures = (f"{b.parameters:,}", size, peak, by_storage(b.weight_bytes))
            table.add_row(b.name, runs(b.rate), ", ".join(b.functions), *figures, _errors(b), ", ".join(sources))
        groups.append(table)
        sizes = _sizes(component)
        stored = sizes["bytes_by_storage"]
        groups.append(
            Text(
                f"{sizes['parameters']:,} parameters, {readable_size(sum(stored.values()))} ({by_storage(stored)}) "
                f"in artifacts of {readable_size(sizes['artifact_bytes'])}"
            )
        )
    g, s = m.geometry, m.sampler
    leap = f", leap: {s.leap.kind}" if s.leap is not None else ""
    lines = [
        f"{m.name} ({m.model}), {m.target.name}, {readable_size(sum(f.bytes for f in bundle.files()))}",
        f"{g.frames} frames of {g.width}×{g.height} at {g.fps}/s, "
        f"latents {g.latent_frames}×{g.latent_height}×{g.latent_width}",
        f"{len(s.steps)} denoiser calls, {merged_calls(s.steps)} of them merged, guidance {s.guidance}{leap}",
        *_left_out(s),
        *_int8_inputs(m),
        loading_text(m.loading, m.memory_budget_bytes),
        f"gate: {m.gate.mode}; built with {', '.join(f'{k} {v}' for k, v in m.tools.items())}",
    ]
    return Group(*groups, Text("\n".join(lines)))


def merged_calls(steps: Iterable[Step]) -> int:
    """How many steps run with merged tokens."""
    return sum(ungrouped(s.function) in (MERGED, conditional(MERGED)) for s in steps)


def _left_out(s: SamplerEntry) -> list[str]:
    """What steps leave out, for people."""
    said = []
    for name, own in s.ranges.items():
        steps = [str(i) for i, step in enumerate(s.steps) if step.reuse == name]
        which = f"steps {', '.join(steps)}" if steps else "steps that a rule chooses"
        blocks = own.blocks[0] if len(own.blocks) == 1 else f"{own.blocks[0]} to {own.blocks[-1]}"
        said.append(f"{which}, from 0, leave out {blocks}, of which {readable_size(own.bytes)} are kept")
    halves = [str(i) for i, step in enumerate(s.steps) if step.guidance == "conditional"]
    if halves:
        said.append(
            f"steps {', '.join(halves)}, from 0, compute the conditional half alone; difference: {s.difference}"
        )
    return said


def _int8_inputs(m: Manifest) -> list[str]:
    """Which linear layers round what comes in, and the denoiser's functions from call to call, for people."""
    layers = {name: sum(len(b.int8_inputs) for b in c.blocks) for name, c in m.components.items()}
    said = [f"{name}: {count} linear layers with static int8 activations" for name, count in layers.items() if count]
    if layers.get("transformer"):
        calls: list[str] = []
        for function, run in groupby(enumerate(s.function for s in m.sampler.steps), key=lambda step: step[1]):
            numbers = [number + 1 for number, _ in run]
            calls.append(f"{function} {numbers[0]}-{numbers[-1]}")
        said.append(f"denoiser calls by function, each with scales of its own: {', '.join(calls)}")
    return said


def _errors(block: BlockEntry) -> str:
    if block.accuracy is None:
        return "not executed"
    errors = ", ".join(f"{a.relative_error:.2g}" for a in block.accuracy.values())
    if not block.quantization:
        return errors
    return f"{errors}; of quantization {', '.join(f'{a.relative_error:.2g}' for a in block.quantization.values())}"


def by_storage(bytes_: Mapping[str, int]) -> str:
    """How bytes are stored, most first: what is alone without its size."""
    if len(bytes_) < 2:
        return "".join(bytes_)
    return ", ".join(f"{k} {readable_size(v)}" for k, v in sorted(bytes_.items(), key=lambda kv: -kv[1]))


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


def cache_json(store: Store, action: str) -> dict[str, Any]:
    """Show, verify or clear the store; what there is, or was."""
    kinds: dict[str, dict[str, int]] = {}
    damaged = []
    for entry in store.entries():
        found = kinds.setdefault(entry.kind, {"entries": 0, "bytes": 0})
        found["entries"] += 1
        found["bytes"] += entry.bytes
        if action == "verify" and not entry.intact(thorough=True):
            damaged.append(f"{entry.kind}/{entry.key}")
            store.remove(entry)
    data: dict[str, Any] = {"location": str(store.root), "limit_bytes": store.limit_bytes, "kinds": kinds}
    if action == "verify":
        data["damaged"] = damaged
    if action == "clear":
        data["removed_bytes"] = store.clear()
    return data


def cache_table(data: dict[str, Any]) -> RenderableType:
    """The store for people."""
    total = sum(k["bytes"] for k in data["kinds"].values())
    lines = [f"{data['location']}: {readable_size(total)} of at most {readable_size(data['limit_bytes'])}"]
    lines += [f"  {kind}: {k['entries']}, {readable_size(k['bytes'])}" for kind, k in data["kinds"].items()]
    if "damaged" in data:
        lines.append(f"{len(data['damaged'])} damaged entries removed" if data["damaged"] else "all entries are whole")
    if "removed_bytes" in data:
        lines.append(f"cleared: {readable_size(data['removed_bytes'])}")
    return Text("\n".join(lines))
