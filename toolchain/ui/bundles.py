"""Bundles as tables for people and as plain data for machines, from their manifests alone."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.formats.bom import stored_bytes
from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import BlockEntry, Component, Manifest
from toolchain.formats.sampling import SamplerEntry
from toolchain.system.disk import readable_size
from toolchain.ui.loading import loading_text
from toolchain.ui.phrases import by_storage, merged_calls, runs, tiled_text


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
    return {
        "parameters": sum(b.parameters for b in component.blocks),
        "bytes_by_storage": stored_bytes(component),
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
        "release": f"all functions executed, largest relative error {worst:.2g}",
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
        *tiled_text(m.decoding.stages if m.decoding else ()),
        loading_text(m.loading, m.memory_budget_bytes),
        f"gate: {m.gate.mode}; built with {', '.join(f'{k} {v}' for k, v in m.tools.items())}",
    ]
    return Group(*groups, Text("\n".join(lines)))


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
