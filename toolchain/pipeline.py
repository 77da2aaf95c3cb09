"""Recipe → bundle: lower every block, execute it, write what a device has to know."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from toolchain import describe
from toolchain import manifest as m
from toolchain.blocks import Block, table_nodes
from toolchain.bundle import RECIPE_FILE, Bundle, describe_file, staging
from toolchain.checkpoint import Checkpoint, match, open_checkpoint
from toolchain.components import Definition, sample_input
from toolchain.errors import CheckpointError, RecipeError
from toolchain.gate import ReferenceRun, hold
from toolchain.graph import Graph
from toolchain.listener import Listener
from toolchain.lowering import Lowering, Plan, plan
from toolchain.recipe import Recipe, TextEncoderRecipe
from toolchain.target import EngineUnavailableError, Target
from toolchain.templates import Templates

TOKENIZER_FILE = "spiece.model"


def compile_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | Path | None = None,
    listener: Listener | None = None,
    direct: bool = False,
) -> Bundle:
    """Build ``recipe`` into the bundle ``out``.

    Args:
        out: the bundle's folder. It appears whole or not at all; an older bundle there is replaced.
        base: folder that relative checkpoint paths are looked for in first.
        listener: is told of progress.
        direct: lower every block by itself instead of stamping those that share a structure.

    Raises:
        SoraCompileError: says what, where and what to do; ``exit_code`` is the command's.
    """
    base, listener = Path(base or "."), listener or Listener()
    with staging(Path(out)) as folder:
        planned = plan(recipe, base=base, listener=listener)
        checkpoints = {n: open_checkpoint(part.checkpoint, base) for n, part in recipe.components().items()}
        pins = {n: pin(checkpoints[n], part.sha256) for n, part in recipe.components().items()}
        for name, lowering in planned.components.items():
            match(checkpoints[name], lowering.definition.expected, name, lowering.definition.aliases)
        tokenizer = _copy_tokenizer(recipe, checkpoints, base, folder)
        components = {n: _build(planned, n, checkpoints[n], folder, listener, direct) for n in planned.components}
        (folder / RECIPE_FILE).write_text(resolve(planned, checkpoints, pins).to_yaml(), encoding="utf-8")
        manifest = describe.manifest(planned, components, tokenizer, describe_file(folder / RECIPE_FILE, folder))
        (folder / m.FILE_NAME).write_text(describe.manifest_text(manifest), encoding="utf-8")
    return Bundle(Path(out), manifest)


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


def resolve(planned: Plan, checkpoints: Mapping[str, Checkpoint], pins: Mapping[str, str | None]) -> Recipe:
    """The recipe with nothing left open: configurations written out, checkpoints pinned, passes as they ran."""
    data = planned.recipe.model_dump(mode="json")
    for name, lowering in planned.components.items():
        data[name] |= {
            "checkpoint": checkpoints[name].location,
            "sha256": pins[name],
            "config": describe.plain(lowering.definition.config),
            "precision": lowering.target.precision,
            "passes": [{p.name: p.config.model_dump(mode="json", exclude_none=True)} for p in lowering.passes],
        }
    data["target"] = {"name": planned.target.name, **planned.target.config.model_dump(mode="json")}
    return Recipe.model_validate(data)


def _copy_tokenizer(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], base: Path, folder: Path) -> m.File | None:
    part = recipe.text_encoder
    if part is None:
        return None
    source = find_tokenizer(part, checkpoints["text_encoder"], base)
    place = folder / "text_encoder" / TOKENIZER_FILE
    place.parent.mkdir()
    shutil.copyfile(source, place)
    return describe_file(place, folder)


def find_tokenizer(part: TextEncoderRecipe, checkpoint: Checkpoint, base: Path) -> Path:
    """The sentencepiece model: beside the weights, or a path of its own.

    Raises:
        CheckpointError: there is none.
    """
    beside = checkpoint.beside(part.tokenizer)
    for path in (beside, base / part.tokenizer, Path(part.tokenizer)):
        if path is not None and path.is_file():
            return path
    raise CheckpointError(
        f"text_encoder.tokenizer: '{part.tokenizer}' is neither beside '{checkpoint.location}' nor a file; "
        "give the path of the sentencepiece model"
    )


def read_weights(block: Block, checkpoint: Checkpoint, aliases: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The block's weights as float32, by its own names. Only these tensors are read."""
    held = checkpoint.infos()

    def read(name: str) -> torch.Tensor:
        return checkpoint.tensor(name if name in held else aliases.get(name, name))

    return {name: source.of(read(source.tensor)).float().contiguous() for name, source in block.weights.items()}


def read_named(checkpoint: Checkpoint, definition: Definition) -> dict[str, torch.Tensor]:
    """All of a component's weights as float32, by official name; for those who want it whole."""
    held = checkpoint.infos()
    names = {n: n if n in held else definition.aliases.get(n, n) for n in definition.expected}
    return {name: checkpoint.tensor(own).float() for name, own in names.items()}


def evaluate_tables(graph: Graph, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Values that depend on no input (positions, the null prompt), computed with the checkpoint's numbers."""
    gm = graph.functions["base"]
    values: dict[Any, Any] = {}

    def value(node: Any) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            values[node] = checkpoint.tensor(graph.weights[str(node.target)].tensor).float()
            return values[node]
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        if node.op == "call_module":
            prefix = f"{node.target}."
            own = {k.removeprefix(prefix): s for k, s in graph.weights.items() if k.startswith(prefix)}
            state = {k: s.of(checkpoint.tensor(s.tensor)).float() for k, s in own.items()}
            module = gm.get_submodule(str(node.target))
            values[node] = torch.func.functional_call(module, state, tuple(args), dict(kwargs))
        else:
            values[node] = node.target(*args, **kwargs)
        return values[node]

    with torch.no_grad():
        return {name: value(node).float().contiguous() for name, node in table_nodes(graph).items()}


def _build(
    planned: Plan, name: str, checkpoint: Checkpoint, folder: Path, listener: Listener, direct: bool
) -> m.Component:
    """Lower, check and execute every block of a component."""
    lowering, recipe = planned.components[name], planned.recipe
    place = folder / name
    place.mkdir(exist_ok=True)
    tables: dict[str, torch.Tensor] = {}
    for graph in lowering.graphs:
        tables |= evaluate_tables(graph, checkpoint)
    tables_file = None
    if tables:
        path = place / "tables.safetensors"
        save_file(tables, path)
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        tables_file = describe_file(path, folder)
    listener.start(name, [b.name for b in lowering.blocks])
    references: dict[str, dict[str, ReferenceRun]] = {}
    for graph in lowering.graphs:
        references |= dict.fromkeys(graph.blocks(), _references(lowering, graph, recipe, tables))
    with tempfile.TemporaryDirectory() as scratch:
        templates = Templates(lowering.target, lowering.blocks, Path(scratch), listener, direct)
        entries = [
            _build_block(
                lowering, templates, block, eager, references[block.name], checkpoint, folder, recipe, listener
            )
            for block, eager in zip(lowering.blocks, lowering.reference, strict=True)
        ]
    return describe.component(lowering, entries, tables_file, tables)


def _references(
    lowering: Lowering, graph: Graph, recipe: Recipe, tables: Mapping[str, torch.Tensor]
) -> dict[str, ReferenceRun]:
    """Eager runs of a graph's blocks, one per function: functions may differ in the shapes they take."""
    names = set(graph.blocks())
    blocks = tuple(b for b in lowering.reference if b.name in names)
    runs = {}
    for function in graph.functions:
        generator = torch.Generator().manual_seed(recipe.gate.seed)
        values = {spec.name: sample_input(spec, recipe, generator) for spec in graph.inputs_of(function)}
        runs[function] = ReferenceRun(blocks, values, tables)
    return runs


def _build_block(
    lowering: Lowering,
    templates: Templates,
    block: Block,
    eager: Block,
    references: Mapping[str, ReferenceRun],
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    listener: Listener,
) -> m.BlockEntry:
    name, target, aliases = lowering.name, lowering.target, lowering.definition.aliases
    listener.working(name, block.name, "lower")
    out = folder / name / f"{block.name}{target.suffix}"
    artifact = templates.build(block, read_weights(block, checkpoint, aliases), out)
    listener.working(name, block.name, "check")
    target.check(artifact.path, block)
    accuracy = None
    try:
        engine = target.engine(artifact.path, block.inputs, block.outputs)
    except EngineUnavailableError as e:
        listener.remark(f"{target.name}: not executed: {e}")
    else:
        listener.working(name, block.name, "execute")
        weights = read_weights(eager, checkpoint, aliases)
        accuracy = hold(eager, artifact.functions, engine, references, weights, gate_limit(recipe, target))
    listener.finished(name, block.name, accuracy)
    return describe.block(block, artifact, accuracy, target, folder)


def gate_limit(recipe: Recipe, target: Target) -> float:
    """The gate's limit for the target's precision.

    Raises:
        RecipeError: the recipe gives none.
    """
    limits = recipe.gate.max_relative_error
    if target.precision not in limits:
        hint = f"add '{target.precision}: 0.001' or the like"
        raise RecipeError(f"gate.max_relative_error: no limit for {target.precision}; {hint}")
    return limits[target.precision]
