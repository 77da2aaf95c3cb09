"""What was built, as manifest entries."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from toolchain.build.gate import Passed
from toolchain.formats import manifest as m
from toolchain.formats.calls import Rate
from toolchain.formats.consistency import check_manifest
from toolchain.formats.manifest import GateMode
from toolchain.formats.recipe import Recipe
from toolchain.formats.sampling import SamplerEntry, StepEntry
from toolchain.ir.blocks import Block, Port
from toolchain.ir.dtypes import PortType
from toolchain.ir.feeds import Given
from toolchain.ir.graph import Input
from toolchain.ir.target import Target
from toolchain.planning.memory import BlockMemory
from toolchain.planning.plan import ComponentPlan, Plan
from toolchain.planning.resolve import ResolvedBuild
from toolchain.planning.sampling import Sampling
from toolchain.planning.video import decoding_stages
from toolchain.version import VERSION


def manifest_text(manifest: m.Manifest) -> str:
    """The manifest as it is written.

    Raises:
        RuntimeError: it contradicts itself, so players would refuse it: an error of this program.
    """
    try:
        check_manifest(manifest)
    except ValueError as e:
        raise RuntimeError(f"the manifest of what was built contradicts itself: {e}") from e
    return json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it."""
    data: dict[str, Any] = json.loads(json.dumps(config))
    return data


def block(
    block: Block,
    files: Sequence[m.File],
    functions: Sequence[str],
    passed: Passed | None,
    goldens: m.File | None,
    target: Target,
    folder: str,
    memory: BlockMemory,
) -> m.BlockEntry:
    """A block and its artifact, whose files lie in ``folder`` of the bundle."""
    base = {p.name: p.shape for p in (*block.inputs, *block.outputs)}
    others = {
        function: {p.name: list(p.shape) for p in (*s.inputs, *s.outputs) if p.shape != base[p.name]}
        for function, s in block.signatures.items()
    }
    return m.BlockEntry(
        name=block.name,
        artifact=f"{folder}/{block.name}{target.suffix}",
        files=list(files),
        rate=cast(Rate, block.rate),
        functions=list(functions),
        inputs=[m.InputSpec(**_tensor(p, target), source=block.sources[p.name]) for p in block.inputs],
        outputs=[m.TensorSpec(**_tensor(p, target)) for p in block.outputs],
        other_shapes={f: shapes for f, shapes in others.items() if shapes},
        parameters=block.parameters,
        weight_bytes=bytes_by_storage([block]),
        quantized=block.quantized,
        int8_inputs=list(block.int8_inputs),
        structure=block.structure(),
        accuracy=None if passed is None else passed.accuracy,
        quantization=None if passed is None else passed.quantization,
        memory=_memory(memory, functions),
        activations=None if passed is None else passed.activations,
        goldens=goldens,
    )


def _memory(memory: BlockMemory, functions: Sequence[str]) -> dict[str, m.Memory]:
    return {
        f: m.Memory(
            weights=memory.weights,
            activations=memory.peaks[f].bytes,
            ports=memory.peaks[f].ports,
            waiting=memory.waiting,
        )
        for f in functions
    }


def bytes_by_storage(blocks: Iterable[Block]) -> dict[str, int]:
    """Bytes of the weights of blocks by how they are stored."""
    found: dict[str, int] = {}
    for weight in (w for block in blocks for w in block.weights.values()):
        found[weight.storage.name] = found.get(weight.storage.name, 0) + weight.bytes
    return dict(sorted(found.items()))


def _tensor(port: Port | Input, target: Target) -> dict[str, Any]:
    """A port's (or component input's) name, shape and dtype in the artifact."""
    return {"name": port.name, "dtype": target.port_dtype(port).name, "shape": list(port.shape)}


def component(
    plan: ComponentPlan, entries: Sequence[m.BlockEntry], tables_file: m.File | None, tables: Mapping[str, torch.Tensor]
) -> m.Component:
    """A component: its blocks, how they are wired, and in which order they run."""
    dims: dict[str, int] = {}
    gives: dict[str, Given] = {}
    for graph in plan.graphs:
        dims |= {k: v for k, v in graph.dims.items() if k not in dims}
        gives |= graph.gives
    order: dict[Any, list[str]] = {}
    for entry in entries:
        order.setdefault(entry.rate, []).append(entry.name)
    return m.Component(
        precision=cast(PortType, plan.target.precision),
        dims=dims,
        config=plain(plan.definition.config),
        passes=str(plan.passes),
        inputs=[
            m.ComponentInput(**_tensor(i, plan.target), rate=cast(Rate, i.rate), feed=i.feed)
            for graph in plan.graphs
            for i in graph.inputs
        ],
        outputs=[
            m.ComponentOutput(source=f"{block.name}.{port}", rate=cast(Rate, block.rate), gives=gives[output])
            for block in plan.blocks
            for port, output in block.results.items()
            if output in gives
        ],
        tables_file=tables_file,
        tables=[m.Table(name=k, shape=list(v.shape)) for k, v in sorted(tables.items())],
        blocks=list(entries),
        load_order=order,
    )


def sampler(recipe: Recipe, sampling: Sampling) -> SamplerEntry:
    """The denoising plan, as the device runs it."""
    own = recipe.sampler
    return SamplerEntry(
        guidance=own.guidance,
        difference=own.difference,
        leap=own.leap.resolve(own.steps) if own.leap is not None else None,
        ranges=sampling.entries(),
        rule=sampling.rule,
        steps=[
            StepEntry(timestep=s.t, dt=s.dt, function=s.function, leap=s.leap, guidance=s.guidance, reuse=s.reuse)
            for s in sampling.steps
        ],
    )


def _decoding(build: ResolvedBuild) -> m.DecodingEntry | None:
    stages = list(decoding_stages(build))
    return m.DecodingEntry(stages=stages) if stages else None


def _text(build: ResolvedBuild, tokenizer: m.File | None) -> m.TextEntry | None:
    if tokenizer is None:
        return None
    prompt = build.family.prompt(build.recipe, build.configs)
    return m.TextEntry(
        tokenizer=tokenizer, max_tokens=prompt.max_tokens, suffixes=list(prompt.suffixes), cleaning=prompt.cleaning
    )


def manifest(
    planned: Plan, components: Mapping[str, m.Component], tokenizer: m.File | None, recipe_file: m.File
) -> m.Manifest:
    """The whole bundle."""
    build, recipe, target = planned.resolved, planned.recipe, planned.target
    mode: GateMode = recipe.gate.mode
    if mode in ("every", "release") and any(b.accuracy is None for c in components.values() for b in c.blocks):
        mode = "interface"
    precisions = {plan.target.arithmetic(b) for plan in planned.components.values() for b in plan.blocks}
    return m.Manifest(
        format_version=m.FORMAT_VERSION,
        name=recipe.name,
        model=recipe.model,
        target=m.TargetEntry(name=target.name, options=target.config.model_dump(mode="json")),
        geometry=build.family.geometry(recipe, build.configs),
        memory_budget_bytes=build.memory_budget,
        text=_text(build, tokenizer),
        sampler=sampler(recipe, planned.sampling),
        decoding=_decoding(build),
        components=dict(components),
        gate=m.Gate(
            mode=mode,
            seed=recipe.gate.seed,
            inputs={"every": recipe.gate.inputs, "release": recipe.gate.inputs, "structure": 1}.get(mode, 0),
            limits={
                p: recipe.gate.max_relative_error[p] for p in sorted(precisions) if p in recipe.gate.max_relative_error
            },
        ),
        tools=dict(sorted({"sora-compile": VERSION, "python": platform.python_version(), **target.versions()}.items())),
        recipe=recipe_file,
        loading=planned.loading.entry(),
        golden=None,
    )
