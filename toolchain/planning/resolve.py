"""What a build needs, found once: family, targets, passes, configurations and checkpoints, in one frozen object.

The build's key, the plan and the tasks of other processes all start from it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import CheckpointError, RecipeError
from toolchain.formats.device import UNSPECIFIED, Device, load_device
from toolchain.formats.recipe import ComponentRecipe, Recipe
from toolchain.formats.schedule import BASE, MERGED
from toolchain.ir.functions import conditional
from toolchain.ir.passes import Pipeline, find_pass, passes_providing
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.ir.target import Target, find_target
from toolchain.models.family import Configs, ModelFamily, find_family
from toolchain.weights.checkpoint import Checkpoint, local_path, open_checkpoint, read_config


@dataclass(frozen=True)
class ResolvedComponent:
    """A component's part of a build."""

    name: str
    recipe: ComponentRecipe
    family: ModelFamily
    config: Mapping[str, Any]
    """As its ``config.json`` or the recipe has it."""
    target: Target
    """With the component's own precision, where it has one."""
    passes: Pipeline
    opened: Checkpoint | None
    """None for a plan, which needs no weights."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint; only of a build that was resolved with its checkpoints."""
        if self.opened is None:
            raise RuntimeError(f"{self.name}: resolved without its checkpoint")
        return self.opened


@dataclass(frozen=True)
class ResolvedBuild:
    """A recipe with everything that it names found, opened and validated."""

    recipe: Recipe
    base: Path
    """Folder that relative paths are looked for in first."""
    family: ModelFamily
    target: Target
    """With the recipe's options; a component's own may have another precision."""
    components: Mapping[str, ResolvedComponent]

    @functools.cached_property
    def device(self) -> Device:
        """The recipe's device; where it names none, one of which nothing is known.

        Raises:
            RecipeError: there is no such device; names those that are near.
        """
        return load_device(self.recipe.device or UNSPECIFIED, self.base)

    @property
    def memory_budget(self) -> int | None:
        """Bytes for weights and activations: the recipe's, or else what its device gives an app, or None."""
        if self.recipe.memory_budget is not None or self.recipe.device is None:
            return self.recipe.memory_budget
        return int(self.device.memory_bytes.value)

    @property
    def configs(self) -> Configs:
        """Configurations by component, as the family takes them."""
        return {name: part.config for name, part in self.components.items()}


def resolve(recipe: Recipe, base: Path, *, checkpoints: bool) -> ResolvedBuild:
    """Find all that ``recipe`` names.

    Args:
        base: folder that relative paths are looked for in first.
        checkpoints: open them too; a plan does without.

    Raises:
        SoraCompileError: something is not there or does not fit; names the key.
    """
    family = find_family(recipe.model)
    target = find_target(recipe.target.name, recipe.target.options)
    passes = {name: load_pipeline(recipe, name, family) for name in recipe.components()}
    parts = {}
    for name, part in recipe.components().items():
        opened = open_checkpoint(part.checkpoint, base) if checkpoints else None
        config = _configuration(name, part, base)
        parts[name] = ResolvedComponent(name, part, family, config, _target(recipe, name, part), passes[name], opened)
    return ResolvedBuild(recipe, base, family, target, parts)


def _target(recipe: Recipe, name: str, part: ComponentRecipe) -> Target:
    if part.precision is None:
        return find_target(recipe.target.name, recipe.target.options)
    return find_target(recipe.target.name, {**recipe.target.options, "precision": part.precision}, key=name)


def load_pipeline(recipe: Recipe, component: str, family: ModelFamily) -> Pipeline:
    """A component's passes; where none of them partitions, the family's default partition is added.

    Raises:
        RecipeError: a pass is unknown, its options are wrong, a partition is not the last, or a function that the
            sampler asks for is provided by none.
    """
    key = f"{component}.passes"
    specs = recipe.components()[component].passes
    passes = [find_pass(s.name, s.options, f"{key}.{i}") for i, s in enumerate(specs)]
    cuts = [p for p in passes if p.phase == "partition"]
    if len(cuts) > 1 or (cuts and passes[-1] is not cuts[0]):
        raise RecipeError(f"{key}: '{cuts[0].name}' must be the last pass, and be listed once")
    if not cuts:
        ((name, options),) = parse_pipeline(family.default_partition(component))
        cuts = [find_pass(name, options, key)]
    pipeline = Pipeline(tuple(p for p in passes if p.phase == "rewrite"), cuts[0])
    for at, grouping in enumerate(passes):
        late = [p for p in passes[at:] if p.provides and p is not grouping and grouping.groups is not None]
        if late:
            raise RecipeError(
                f"{key}: '{late[0].name}' adds a function that '{grouping.name}' would know nothing of; list it before"
            )
    wanted = {"merged_steps": MERGED} if recipe.sampler.merged_steps else {}
    wanted |= {"conditional": conditional(BASE)} if recipe.sampler.conditional_steps else {}
    for asking, function in wanted.items() if component == "transformer" else ():
        if function not in pipeline.provides:
            known = ", ".join(passes_providing(function)) or "none"
            raise RecipeError(f"sampler.{asking}: needs a pass in {key} that provides '{function}'; installed: {known}")
    return pipeline


def _configuration(component: str, part: ComponentRecipe, base: Path) -> Mapping[str, Any]:
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


def find_tokenizer(build: ResolvedBuild) -> Path | None:
    """The sentencepiece model: beside the weights, or a path of its own; None for a recipe without text encoder.

    Raises:
        CheckpointError: there is none.
    """
    part = build.recipe.text_encoder
    if part is None:
        return None
    checkpoint = build.components["text_encoder"].checkpoint
    for path in (checkpoint.beside(part.tokenizer), build.base / part.tokenizer, Path(part.tokenizer)):
        if path is not None and path.is_file():
            return path
    raise CheckpointError(
        f"text_encoder.tokenizer: '{part.tokenizer}' is neither beside '{checkpoint.location}' nor a file; "
        "give the path of the sentencepiece model"
    )
