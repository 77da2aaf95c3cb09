"""Recipe → bundle. Each step is a function; the arrows between them are here."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from toolchain import manifest as m
from toolchain.blocks import Block, extract_blocks, table_nodes
from toolchain.bundle import RECIPE_FILE, Bundle, describe_artifact, describe_file, staging
from toolchain.checkpoint import Checkpoint, match, open_checkpoint, read_config
from toolchain.components import MEANINGS, Definition, define_transformer, sample_inputs
from toolchain.errors import CheckpointError, RecipeError
from toolchain.gate import ReferenceRun, hold
from toolchain.graph import Graph, capture
from toolchain.graph_text import graph_text
from toolchain.legalise import Legalise, LegaliseConfig
from toolchain.listener import Listener
from toolchain.passbase import Pass
from toolchain.plugins import find_pass, find_target
from toolchain.recipe import Recipe
from toolchain.schedule import plan_steps
from toolchain.target import EngineUnavailableError, Target

BYTES_PER_WEIGHT = {"float16": 2.0, "float32": 4.0}


@dataclass(frozen=True)
class Lowering:
    """A component as it will be lowered: the blocks that targets see, and the reference they are held against."""

    definition: Definition
    passes: tuple[Pass, ...]
    graph: Graph
    blocks: tuple[Block, ...]
    reference: tuple[Block, ...]


@dataclass(frozen=True)
class Plan:
    """What a recipe would build, without building it."""

    recipe: Recipe
    target: Target
    lowering: Lowering

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.lowering.blocks

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights in a block's artifact, by the target's precision."""
        return BYTES_PER_WEIGHT[self.target.precision]


def plan(recipe: Recipe, *, base: Path | None = None, listener: Listener | None = None) -> Plan:
    """Everything up to lowering: reads the configuration, captures, runs the passes and partitions.

    Args:
        base: folder that relative checkpoint paths are looked for in first.

    Raises:
        SoraCompileError: the recipe cannot be built; says why.
    """
    base = base or Path()
    target = find_target(recipe.target.name, recipe.target.options)
    passes = load_passes(recipe)
    config = recipe.transformer.config or _configuration(recipe.transformer.checkpoint, base)
    definition = define_transformer(recipe, config)
    return Plan(recipe, target, lower_graph(definition, passes, target, listener or Listener()))


def load_passes(recipe: Recipe) -> tuple[Pass, ...]:
    """The recipe's passes; ``partition`` is added with its defaults when it is not listed.

    Raises:
        RecipeError: a pass is unknown, its options are wrong, or ``partition`` is not the last.
    """
    specs = recipe.transformer.passes
    passes = [find_pass(s.name, s.options, f"transformer.passes.{i}") for i, s in enumerate(specs)]
    if any(p.name == "partition" for p in passes[:-1]):
        raise RecipeError("transformer.passes: 'partition' must be the last pass, and be listed once")
    if not passes or passes[-1].name != "partition":
        passes.append(find_pass("partition", {}, "transformer.passes"))
    if recipe.sampler.merged_steps and not any(p.name == "token-merge" for p in passes):
        raise RecipeError("sampler.merged_steps: needs 'token-merge' in transformer.passes")
    return tuple(passes)


def _configuration(location: str, base: Path) -> Mapping[str, Any]:
    checkpoint_config = None
    if location.startswith("hf://"):
        from toolchain.hub import fetch

        checkpoint_config = read_config(fetch(location)[1])
    else:
        from toolchain.checkpoint import local_path

        path = local_path(location, base)
        checkpoint_config = read_config(path if path.is_dir() else path.parent)
    if checkpoint_config is None:
        raise CheckpointError(
            f"transformer: no config.json beside '{location}'; add it, or give transformer.config in the recipe"
        )
    return checkpoint_config


def lower_graph(definition: Definition, passes: tuple[Pass, ...], target: Target, listener: Listener) -> Lowering:
    """Capture a component and run its passes; ``legalise``, with the target's rules, goes before ``partition``."""
    graph = capture(definition.form)
    graph = dataclasses.replace(graph, bytes_per_weight=BYTES_PER_WEIGHT[target.precision])
    listener.graph(definition.name, "capture", graph)
    *rewrites, partition = passes
    for rewrite in rewrites:
        graph = rewrite(graph).graph
        listener.graph(definition.name, rewrite.name, graph)
    legalise = Legalise(LegaliseConfig(rules=target.rules))
    legal = legalise(graph).graph
    listener.graph(definition.name, legalise.name, legal)
    cut = partition(legal).graph
    listener.graph(definition.name, partition.name, cut)
    # the reference skips legalisation, so that the gate covers it too
    return Lowering(definition, passes, cut, extract_blocks(cut), extract_blocks(partition(graph).graph))


def compile_recipe(
    recipe: Recipe, out: str | Path, *, base: str | Path | None = None, listener: Listener | None = None
) -> Bundle:
    """Build ``recipe`` into the bundle ``out``.

    Args:
        out: the bundle's folder. It appears whole or not at all; an older bundle there is replaced.
        base: folder that relative checkpoint paths are looked for in first.
        listener: is told of progress.

    Raises:
        SoraCompileError: says what, where and what to do; ``exit_code`` is the command's.
    """
    base, listener = Path(base or "."), listener or Listener()
    with staging(Path(out)) as folder:
        planned = plan(recipe, base=base, listener=listener)
        checkpoint = open_checkpoint(recipe.transformer.checkpoint, base)
        pinned = pin(checkpoint, recipe.transformer.sha256)
        match(checkpoint, planned.lowering.definition.expected, "transformer")
        component, executed = _build_component(planned, checkpoint, folder, listener)
        resolved = resolve(planned, checkpoint, pinned)
        (folder / RECIPE_FILE).write_text(resolved.to_yaml(), encoding="utf-8")
        manifest = _manifest(planned, component, executed, folder)
        (folder / m.FILE_NAME).write_text(manifest_text(manifest), encoding="utf-8")
    return Bundle(Path(out), manifest)


def manifest_text(manifest: m.Manifest) -> str:
    """The manifest as it is written."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def pin(checkpoint: Checkpoint, expected: str | None) -> str | None:
    """What pins a checkpoint besides its location: the digest of a local one; a remote one has its commit.

    Raises:
        CheckpointError: the recipe expects other content.
    """
    if checkpoint.location.startswith("hf://"):
        return None
    found = checkpoint.digest()
    if expected not in (None, found):
        raise CheckpointError(
            f"checkpoint '{checkpoint.location}' has sha256 {found}, the recipe expects {expected}; "
            "use the checkpoint that the recipe was made for, or remove its sha256"
        )
    return found


def resolve(planned: Plan, checkpoint: Checkpoint, sha256: str | None) -> Recipe:
    """The recipe with nothing left open: configuration written out, checkpoint pinned, passes as they ran."""
    passes = [{p.name: p.config.model_dump(mode="json", exclude_none=True)} for p in planned.lowering.passes]
    data = planned.recipe.model_dump(mode="json")
    data["transformer"] |= {
        "checkpoint": checkpoint.location,
        "sha256": sha256,
        "config": json.loads(json.dumps(planned.lowering.definition.config)),
        "passes": passes,
    }
    data["target"] = {"name": planned.target.name, **planned.target.config.model_dump(mode="json")}
    return Recipe.model_validate(data)


def read_weights(block: Block, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The block's weights as float32, by its own names. Only these tensors are read."""
    return {
        name: source.of(checkpoint.tensor(source.tensor)).float().contiguous() for name, source in block.weights.items()
    }


def evaluate_tables(lowering: Lowering, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Values that depend on no input (positions, the null prompt), computed with the checkpoint's numbers."""
    gm = lowering.graph.functions["base"]
    values: dict[Any, Any] = {}

    def value(node: Any) -> Any:
        if node not in values:
            if node.op == "get_attr":
                values[node] = checkpoint.tensor(lowering.graph.weights[str(node.target)].tensor).float()
            elif node.op == "call_module":
                path = str(node.target)
                state = {
                    k.removeprefix(f"{path}."): s.of(checkpoint.tensor(s.tensor)).float()
                    for k, s in lowering.graph.weights.items()
                    if k.startswith(f"{path}.")
                }
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
                values[node] = torch.func.functional_call(gm.get_submodule(path), state, tuple(args), dict(kwargs))
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
                values[node] = node.target(*args, **kwargs)
        return values[node]

    with torch.no_grad():
        return {name: value(node).float().contiguous() for name, node in table_nodes(lowering.graph).items()}


def _build_component(
    planned: Plan, checkpoint: Checkpoint, folder: Path, listener: Listener
) -> tuple[m.Component, bool]:
    """Lower, check and execute every block; returns the manifest's entry and whether artifacts were executed."""
    lowering, target, recipe = planned.lowering, planned.target, planned.recipe
    name = lowering.definition.name
    place = folder / name
    place.mkdir()
    tables = evaluate_tables(lowering, checkpoint)
    tables_file = place / "tables.safetensors"
    save_file(tables, tables_file)
    tables_file.chmod(0o644)  # safetensors writes files that only their owner can read
    inputs = sample_inputs(lowering.definition.form, recipe, recipe.gate.seed)
    reference = ReferenceRun(lowering.reference, inputs, tables)
    limit = gate_limit(recipe, target)
    listener.start(name, [b.name for b in lowering.blocks])
    entries, executed = [], True
    for block, eager in zip(lowering.blocks, lowering.reference, strict=True):
        listener.working(name, block.name, "lower")
        artifact = target.lower(block, read_weights(block, checkpoint), place / f"{block.name}{target.suffix}")
        listener.working(name, block.name, "check")
        target.check(artifact.path, block)
        accuracy = None
        try:
            engine = target.engine(artifact.path, block.inputs, block.outputs)
        except EngineUnavailableError as e:
            executed = False
            listener.remark(f"{name}: not executed: {e}")
        else:
            listener.working(name, block.name, "execute")
            accuracy = hold(eager, artifact.functions, engine, reference, read_weights(eager, checkpoint), limit)
        entries.append(_block_entry(block, artifact.path, artifact.functions, accuracy, target, folder))
        listener.finished(name, block.name, accuracy)
    return _component_entry(lowering, entries, describe_file(tables_file, folder), tables, target), executed


def gate_limit(recipe: Recipe, target: Target) -> float:
    """The gate's limit for the target's precision.

    Raises:
        RecipeError: the recipe gives none.
    """
    limits = recipe.gate.max_relative_error
    if target.precision not in limits:
        raise RecipeError(
            f"gate.max_relative_error: no limit for {target.precision}; add '{target.precision}: 0.001' or the like"
        )
    return limits[target.precision]


def _block_entry(
    block: Block,
    path: Path,
    functions: tuple[str, ...],
    accuracy: dict[str, m.Accuracy] | None,
    target: Target,
    root: Path,
) -> m.BlockEntry:
    return m.BlockEntry(
        name=block.name,
        artifact=path.relative_to(root).as_posix(),
        files=describe_artifact(path, root),
        rate="prompt" if block.rate == "prompt" else "step",
        functions=list(functions),
        inputs=[m.InputSpec(**_tensor(p, target), source=block.sources[p.name]) for p in block.inputs],
        outputs=[m.TensorSpec(**_tensor(p, target)) for p in block.outputs],
        parameters=block.parameters,
        structure=block.structure(),
        accuracy=accuracy,
    )


def _tensor(port: Any, target: Target) -> dict[str, Any]:
    """A port's (or component input's) name, shape and dtype in the artifact."""
    precision = "float32" if port.exact else target.precision
    dtype = precision if port.dtype.is_floating_point else "int32"
    return {"name": port.name, "dtype": dtype, "shape": list(port.shape)}


def _component_entry(
    lowering: Lowering,
    entries: list[m.BlockEntry],
    tables_file: m.File,
    tables: Mapping[str, torch.Tensor],
    target: Target,
) -> m.Component:
    graph = lowering.graph
    last = entries[-1]
    return m.Component(
        dims=dict(graph.dims),
        config=json.loads(json.dumps(lowering.definition.config)),
        passes=[str(p) for p in lowering.passes],
        inputs=[
            m.ComponentInput(
                **_tensor(i, target), rate="prompt" if i.rate == "prompt" else "step", meaning=MEANINGS[i.name]
            )
            for i in graph.inputs
        ],
        output=f"{last.name}.{last.outputs[0].name}",
        tables_file=tables_file if tables else None,
        tables=[m.Table(name=k, shape=list(v.shape)) for k, v in sorted(tables.items())],
        blocks=entries,
        load_order=m.LoadOrder(
            prompt=[e.name for e in entries if e.rate == "prompt"], step=[e.name for e in entries if e.rate == "step"]
        ),
    )


def sampler_entry(recipe: Recipe) -> m.SamplerEntry:
    """The denoising plan, as the device runs it."""
    sampler = recipe.sampler
    leap = sampler.leap.resolve(sampler.steps) if sampler.leap is not None else None
    steps = plan_steps(recipe.timesteps(), leap)
    return m.SamplerEntry(
        guidance=sampler.guidance,
        leap=leap,
        merged_steps=sampler.merged_steps,
        steps=[
            m.StepEntry(
                timestep=s.t, dt=s.dt, function="merged" if s.index < sampler.merged_steps else "base", leap=s.leap
            )
            for s in steps
        ],
    )


def _manifest(planned: Plan, component: m.Component, executed: bool, folder: Path) -> m.Manifest:
    recipe, target, video = planned.recipe, planned.target, planned.recipe.video
    height, width = video.latent_size
    return m.Manifest(
        name=recipe.name,
        model=recipe.model,
        target=m.TargetEntry(name=target.name, options=target.config.model_dump(mode="json")),
        precision="float16" if target.precision == "float16" else "float32",
        geometry=m.Geometry(
            frames=video.frames,
            height=video.height,
            width=video.width,
            fps=video.fps,
            latent_channels=int(planned.lowering.definition.config["in_channels"]),
            latent_frames=video.latent_frames,
            latent_height=height,
            latent_width=width,
        ),
        sampler=sampler_entry(recipe),
        components={planned.lowering.definition.name: component},
        gate=m.Gate(
            mode="every" if executed else "interface",
            seed=recipe.gate.seed,
            limits={target.precision: gate_limit(recipe, target)},
        ),
        tools=dict(sorted(_tools(target).items())),
        recipe=describe_file(folder / RECIPE_FILE, folder),
    )


def _tools(target: Target) -> dict[str, str]:
    from toolchain.version import VERSION

    return {"sora-compile": VERSION, "python": platform.python_version(), **target.versions()}


def printed_graphs(names: Iterator[str]) -> set[str]:
    """The passes after which a graph can be printed."""
    return {"capture", "legalise", *names}


def graph_dump(component: str, pass_name: str, graph: Graph) -> str:
    """A graph as ``--print-after`` shows it."""
    return f"// after {pass_name} ({component})\n{graph_text(graph)}"
