"""Recipe → blocks: configuration, capture, passes, partition. No weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import CheckpointError, RecipeError
from toolchain.formats.recipe import ComponentRecipe, Recipe
from toolchain.ir.blocks import Block, extract_blocks
from toolchain.ir.graph import Graph, capture, with_function
from toolchain.ir.legalise import Legalise, LegaliseConfig
from toolchain.ir.passes import Pipeline
from toolchain.ir.target import Target
from toolchain.listener import Listener
from toolchain.models.family import Definition, Forms, define
from toolchain.planning.residency import resident_blocks
from toolchain.plugins import find_pass, find_target, passes_providing
from toolchain.weights.checkpoint import local_path, read_config

BYTES_PER_WEIGHT = {"float16": 2.0, "float32": 4.0}
PRINTED = ("capture", "legalise")
"""Points at which a graph can be printed besides after the recipe's own passes."""


@dataclass(frozen=True)
class Lowering:
    """A component as it will be lowered: the blocks that its target sees, and those they are held against.

    ``reference`` blocks skip legalisation, so that the gate covers it too.
    """

    definition: Definition
    target: Target
    passes: Pipeline
    graphs: tuple[Graph, ...]
    blocks: tuple[Block, ...]
    reference: tuple[Block, ...]
    resident: tuple[str, ...]
    """Blocks that the device keeps loaded."""

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def parameters(self) -> int:
        return sum(b.parameters for b in self.blocks)

    @property
    def bytes_per_weight(self) -> float:
        return BYTES_PER_WEIGHT[self.target.precision]


@dataclass(frozen=True)
class Plan:
    """What a recipe would build, without building it."""

    recipe: Recipe
    target: Target
    """With the recipe's options; a component's own may have another precision."""
    components: Mapping[str, Lowering]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in the order in which components and blocks run."""
        return tuple(b for c in self.components.values() for b in c.blocks)


def plan(recipe: Recipe, *, base: str | Path | None = None, listener: Listener | None = None) -> Plan:
    """Everything up to lowering.

    Args:
        base: folder that relative checkpoint paths are looked for in first.
        listener: is shown the graphs.

    Raises:
        SoraCompileError: the recipe cannot be built; says why.
    """
    base, listener = Path(base or "."), listener or Listener()
    passes = {name: load_passes(recipe, name) for name in recipe.components()}
    target = find_target(recipe.target.name, recipe.target.options)
    targets = {name: _target(recipe, name, part) for name, part in recipe.components().items()}
    definitions = _define(recipe, base)
    budget = recipe.memory_budget
    lowered = {n: _lower(definitions[n], passes[n], targets[n], listener, budget) for n in recipe.components()}
    return Plan(recipe, target, lowered)


def _target(recipe: Recipe, name: str, part: ComponentRecipe) -> Target:
    if part.precision is None:
        return find_target(recipe.target.name, recipe.target.options)
    return find_target(recipe.target.name, {**recipe.target.options, "precision": part.precision}, key=name)


def load_passes(recipe: Recipe, component: str) -> Pipeline:
    """A component's passes; ``partition`` is added with its defaults when none that partitions is listed.

    Raises:
        RecipeError: a pass is unknown, its options are wrong, the one that partitions is not the last,
            or none provides a function that the sampler needs.
    """
    key = f"{component}.passes"
    specs = recipe.components()[component].passes
    passes = [find_pass(s.name, s.options, f"{key}.{i}") for i, s in enumerate(specs)]
    for p in passes[:-1]:
        if p.phase == "partition":
            raise RecipeError(f"{key}: '{p.name}' must be the last pass, and be listed once")
    if not passes or passes[-1].phase != "partition":
        passes.append(find_pass("partition", {}, key))
    if component == "transformer" and recipe.sampler.merged_steps and not any("merged" in p.provides for p in passes):
        known = ", ".join(passes_providing("merged")) or "none"
        raise RecipeError(f"sampler.merged_steps: needs a pass in {key} that provides 'merged'; installed: {known}")
    return Pipeline(tuple(passes[:-1]), passes[-1])


def _define(recipe: Recipe, base: Path) -> dict[str, Definition]:
    configs = {name: configuration(name, part, base) for name, part in recipe.components().items()}
    definitions = {n: define(n, recipe, configs[n]) for n in configs if n != "text_encoder"}
    if "text_encoder" in configs:
        denoiser = definitions["transformer"].config
        encoder = define("text_encoder", recipe, configs["text_encoder"], int(denoiser["model_max_length"]))
        if encoder.config["d_model"] != denoiser["caption_channels"]:
            raise RecipeError(
                f"text_encoder: its outputs have {encoder.config['d_model']} channels, "
                f"the transformer takes {denoiser['caption_channels']} (caption_channels)"
            )
        definitions["text_encoder"] = encoder
    return definitions


def configuration(component: str, part: ComponentRecipe, base: Path) -> Mapping[str, Any]:
    """A component's configuration: the recipe's own, or the one beside the weights.

    Raises:
        CheckpointError: there is none.
    """
    if part.config is not None:
        return part.config
    if part.checkpoint.startswith("hf://"):
        from toolchain.weights.hub import fetch

        config = read_config(fetch(part.checkpoint)[1])
    else:
        path = local_path(part.checkpoint, base)
        config = read_config(path if path.is_dir() else path.parent)
    if config is None:
        raise CheckpointError(
            f"{component}: no config.json beside '{part.checkpoint}'; add it, or give {component}.config in the recipe"
        )
    return config


def _lower(
    definition: Definition, passes: Pipeline, target: Target, listener: Listener, budget: int | None
) -> Lowering:
    graphs: list[Graph] = []
    blocks: list[Block] = []
    reference: list[Block] = []
    for forms in definition.forms:
        legal, plain = lower_graph(forms, passes, target, listener)
        graphs.append(legal)
        blocks += extract_blocks(legal)
        reference += extract_blocks(plain)
    resident = resident_blocks(blocks, BYTES_PER_WEIGHT[target.precision], budget, definition.name)
    return Lowering(definition, target, passes, tuple(graphs), tuple(blocks), tuple(reference), tuple(resident))


def lower_graph(
    forms: Forms, passes: Pipeline, target: Target, listener: Listener | None = None
) -> tuple[Graph, Graph]:
    """Capture and run the passes, ``legalise`` with the target's rules before the one that partitions.

    Returns:
        The partitioned graph, and the same without legalisation.
    """
    listener = listener or Listener()
    graph = capture(forms.base)
    for name, form in forms.others.items():
        graph = with_function(graph, name, capture(form))
    graph = dataclasses.replace(graph, bytes_per_weight=BYTES_PER_WEIGHT[target.precision])
    listener.graph(graph.component, "capture", graph)
    for rewrite in passes.rewrites:
        graph = rewrite(graph)
        listener.graph(graph.component, str(rewrite), graph)
    legalise = Legalise(LegaliseConfig(rules=target.rules))
    legal = legalise(graph)
    listener.graph(graph.component, str(legalise), legal)
    cut = passes.partition(legal)
    listener.graph(graph.component, str(passes.partition), cut)
    return cut, passes.partition(graph)
