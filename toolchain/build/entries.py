"""What was built, as manifest entries."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from toolchain.build.gate import Passed
from toolchain.formats import manifest as m
from toolchain.formats.manifest import GateMode
from toolchain.formats.recipe import Recipe
from toolchain.formats.schedule import plan_steps
from toolchain.ir.blocks import Block
from toolchain.ir.target import Target
from toolchain.models.family import MEANINGS, chunk_functions, frames_per_call
from toolchain.planning.plan import Lowering, Plan
from toolchain.version import VERSION


def manifest_text(manifest: m.Manifest) -> str:
    """The manifest as it is written."""
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
        rate=cast(m.Rate, block.rate),
        functions=list(functions),
        inputs=[m.InputSpec(**_tensor(p, target), source=block.sources[p.name]) for p in block.inputs],
        outputs=[m.TensorSpec(**_tensor(p, target)) for p in block.outputs],
        other_shapes={f: shapes for f, shapes in others.items() if shapes},
        parameters=block.parameters,
        structure=block.structure(),
        accuracy=None if passed is None else passed.accuracy,
        activations=None if passed is None else passed.activations,
        goldens=goldens,
    )


def _tensor(port: Any, target: Target) -> dict[str, Any]:
    """A port's (or component input's) name, shape and dtype in the artifact."""
    precision = "float32" if port.exact else target.precision
    dtype = precision if port.dtype.is_floating_point else "int32"
    return {"name": port.name, "dtype": dtype, "shape": list(port.shape)}


def component(
    lowering: Lowering, entries: Sequence[m.BlockEntry], tables_file: m.File | None, tables: Mapping[str, torch.Tensor]
) -> m.Component:
    """A component: its blocks, how they are wired, in which order they run and which stay in memory."""
    dims: dict[str, int] = {}
    for graph in lowering.graphs:
        dims |= {k: v for k, v in graph.dims.items() if k not in dims}
    used = {i.source for e in entries for i in e.inputs}
    order: dict[Any, list[str]] = {}
    outputs: dict[Any, list[str]] = {}
    for entry in entries:
        order.setdefault(entry.rate, []).append(entry.name)
        results = [f"{entry.name}.{o.name}" for o in entry.outputs]
        outputs.setdefault(entry.rate, []).extend(r for r in results if r not in used)
    return m.Component(
        precision="float16" if lowering.target.precision == "float16" else "float32",
        dims=dims,
        config=plain(lowering.definition.config),
        passes=[str(p) for p in lowering.passes],
        inputs=[
            m.ComponentInput(**_tensor(i, lowering.target), rate=cast(m.Rate, i.rate), meaning=MEANINGS[i.name])
            for graph in lowering.graphs
            for i in graph.inputs
        ],
        outputs={rate: names for rate, names in outputs.items() if names},
        tables_file=tables_file,
        tables=[m.Table(name=k, shape=list(v.shape)) for k, v in sorted(tables.items())],
        blocks=list(entries),
        load_order=order,
        resident=list(lowering.resident),
    )


def sampler(recipe: Recipe) -> m.SamplerEntry:
    """The denoising plan, as the device runs it."""
    own = recipe.sampler
    leap = own.leap.resolve(own.steps) if own.leap is not None else None
    return m.SamplerEntry(
        guidance=own.guidance,
        leap=leap,
        merged_steps=own.merged_steps,
        model_fps=recipe.model_fps,
        timesteps=list(recipe.timesteps()),
        steps=[
            m.StepEntry(timestep=s.t, dt=s.dt, function="merged" if s.index < own.merged_steps else "base", leap=s.leap)
            for s in plan_steps(recipe.timesteps(), leap)
        ],
    )


def _decoding(planned: Plan) -> m.DecodingEntry | None:
    if "vae" not in planned.components:
        return None
    from toolchain.models.open_sora_v1_2.vae import OpenSoraVAEConfig

    config = OpenSoraVAEConfig.from_json(planned.components["vae"].definition.config)
    chunks = config.chunks(planned.recipe.video.frames)
    function = {chunk: name for name, chunk in chunk_functions(chunks).items()}
    return m.DecodingEntry(
        chunks=[m.ChunkEntry(latents=c[0], frames=c[1], function=function[c]) for c in chunks],
        frames_per_call=frames_per_call(planned.recipe),
    )


def _text(planned: Plan, tokenizer: m.File | None) -> m.TextEntry | None:
    part = planned.recipe.text_encoder
    if part is None or tokenizer is None:
        return None
    tokens = planned.components["transformer"].definition.config["model_max_length"]
    return m.TextEntry(tokenizer=tokenizer, max_tokens=tokens, aesthetic_score=part.aesthetic_score)


def manifest(
    planned: Plan, components: Mapping[str, m.Component], tokenizer: m.File | None, recipe_file: m.File
) -> m.Manifest:
    """The whole bundle."""
    recipe, target, video = planned.recipe, planned.target, planned.recipe.video
    height, width = video.latent_size
    mode: GateMode = recipe.gate.mode
    if mode == "every" and any(b.accuracy is None for c in components.values() for b in c.blocks):
        mode = "interface"
    precisions = {c.precision for c in components.values()}
    return m.Manifest(
        name=recipe.name,
        model=recipe.model,
        target=m.TargetEntry(name=target.name, options=target.config.model_dump(mode="json")),
        geometry=m.Geometry(
            frames=video.frames,
            height=video.height,
            width=video.width,
            fps=video.fps,
            latent_channels=int(planned.components["transformer"].definition.config["in_channels"]),
            latent_frames=video.latent_frames,
            latent_height=height,
            latent_width=width,
        ),
        memory_budget_bytes=recipe.memory_budget,
        text=_text(planned, tokenizer),
        sampler=sampler(recipe),
        decoding=_decoding(planned),
        components=dict(components),
        gate=m.Gate(
            mode=mode,
            seed=recipe.gate.seed,
            inputs={"every": recipe.gate.inputs, "structure": 1}.get(mode, 0),
            limits={
                p: recipe.gate.max_relative_error[p] for p in sorted(precisions) if p in recipe.gate.max_relative_error
            },
        ),
        tools=dict(sorted({"sora-compile": VERSION, "python": platform.python_version(), **target.versions()}.items())),
        recipe=recipe_file,
        golden=None,
    )
