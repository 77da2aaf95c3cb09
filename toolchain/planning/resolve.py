"""What a build needs, found once: family, targets, passes, configurations and checkpoints, in one frozen object.

The build's key, the plan and the tasks of other processes all start from it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import CheckpointError
from toolchain.formats.device import UNSPECIFIED, Device, load_device
from toolchain.formats.recipe import ComponentRecipe, Recipe
from toolchain.ir.target import Target, find_target
from toolchain.models.family import Configs, ModelFamily, find_family
from toolchain.weights.adapters import find_adapted
from toolchain.weights.checkpoint import HUB, Checkpoint, local_path, read_config, split_choice

if TYPE_CHECKING:
    from toolchain.ir.passes import Pipeline


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
    pipeline: Pipeline | None
    """None as long as nothing is asked but what the build's key is."""
    opened: Checkpoint | None
    """None for a plan, which needs no weights."""

    @property
    def passes(self) -> Pipeline:
        """The passes; only of a build that is whole."""
        if self.pipeline is None:
            raise RuntimeError(f"{self.name}: resolved without its passes")
        return self.pipeline

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
    pipelines = _pipelines(recipe, family)  # before a checkpoint is fetched
    return _whole(_found(recipe, base, family, target, checkpoints), pipelines)


def resolve_lightly(recipe: Recipe, base: Path) -> ResolvedBuild:
    """What the build's key needs: passes are not imported, and no file of weights is read. :func:`completed` does both.

    Raises:
        SoraCompileError: something is not there, or the target's options are wrong; names the key.
    """
    target = find_target(recipe.target.name, recipe.target.options)
    return _found(recipe, base, find_family(recipe.model), target, checkpoints=True)


def completed(build: ResolvedBuild) -> ResolvedBuild:
    """What :func:`resolve` finds with checkpoints, of a build that was resolved lightly.

    Raises:
        SoraCompileError: as :func:`resolve`.
    """
    if all(part.pipeline is not None for part in build.components.values()):
        return build
    return _whole(build, _pipelines(build.recipe, build.family))


def _pipelines(recipe: Recipe, family: ModelFamily) -> dict[str, Pipeline]:
    from toolchain.planning.pipelines import load_pipeline

    return {name: load_pipeline(recipe, name, family) for name in recipe.components()}


def _found(recipe: Recipe, base: Path, family: ModelFamily, target: Target, checkpoints: bool) -> ResolvedBuild:
    parts = {}
    for name, part in recipe.components().items():
        opened = find_weights(part, base) if checkpoints else None
        config = _configuration(name, part, base)
        parts[name] = ResolvedComponent(name, part, family, config, _target(recipe, name, part), None, opened)
    return ResolvedBuild(recipe, base, family, target, parts)


def find_weights(part: ComponentRecipe, base: Path) -> Checkpoint:
    """A component's checkpoint with its adapters merged into it. Raises as :func:`find_adapted`."""
    return find_adapted(part.checkpoint, [(lora.checkpoint, lora.weight) for lora in part.loras], base)


def _whole(build: ResolvedBuild, pipelines: Mapping[str, Pipeline]) -> ResolvedBuild:
    for part in build.components.values():
        if part.opened is not None:
            part.opened.infos()  # says what is wrong with its files
    parts = {name: replace(part, pipeline=pipelines[name]) for name, part in build.components.items()}
    return replace(build, components=parts)


def _target(recipe: Recipe, name: str, part: ComponentRecipe) -> Target:
    if part.precision is None:
        return find_target(recipe.target.name, recipe.target.options)
    return find_target(recipe.target.name, {**recipe.target.options, "precision": part.precision}, key=name)


def _configuration(component: str, part: ComponentRecipe, base: Path) -> Mapping[str, Any]:
    """A component's configuration: the recipe's own, or the one beside the weights.

    Raises:
        CheckpointError: there is none.
    """
    if part.config is not None:
        return part.config
    if part.checkpoint.startswith(HUB):
        from toolchain.weights.hub import fetch

        config = read_config(fetch(split_choice(part.checkpoint)[0])[1])
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
