"""Recipe → blocks: capture, passes, legal forms, partition; what is loaded when. No weight is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import RecipeError
from toolchain.formats.calls import STEP
from toolchain.formats.recipe import Recipe
from toolchain.formats.schedule import Step, groups_of
from toolchain.formats.times import TimesFile, load_times
from toolchain.ir.activations import scale_sources
from toolchain.ir.blocks import Block, BlockPair, extract_blocks
from toolchain.ir.functions import grouped, ungrouped
from toolchain.ir.graph import Graph, capture, with_function
from toolchain.ir.legalise import legalise
from toolchain.ir.passes import Pipeline
from toolchain.ir.storage import Storage
from toolchain.ir.target import Target, UnsupportedStorageError
from toolchain.ir.uses import Use, weight_uses
from toolchain.ir.weights import Weight
from toolchain.listener import Listener
from toolchain.models.family import Definition, Forms
from toolchain.planning.loading.predict import Predicted
from toolchain.planning.memory import BlockMemory, block_memory
from toolchain.planning.ranges import find_ranges
from toolchain.planning.resolve import ResolvedBuild, ResolvedComponent, resolve
from toolchain.planning.sampling import Sampling, sampling
from toolchain.planning.video import predict_video

PRINTED = ("capture", "legalise")
"""Points at which a graph can be printed besides after the recipe's own passes."""


@dataclass(frozen=True)
class ComponentPlan:
    """A component as it will be lowered: its blocks in order, each with the one that it is held against."""

    resolved: ResolvedComponent
    definition: Definition
    graphs: tuple[Graph, ...]
    pairs: tuple[BlockPair, ...]
    memory: Mapping[str, BlockMemory]
    """What each block needs, by name."""

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def target(self) -> Target:
        return self.resolved.target

    @property
    def passes(self) -> Pipeline:
        return self.resolved.passes

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that the target lowers."""
        return tuple(pair.lowered for pair in self.pairs)

    @property
    def parameters(self) -> int:
        return sum(b.parameters for b in self.blocks)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as artifacts keep them."""
        return sum(b.weight_bytes for b in self.blocks)


@dataclass(frozen=True)
class Plan:
    """What a recipe would build, without building it."""

    resolved: ResolvedBuild
    components: Mapping[str, ComponentPlan]
    measured: TimesFile | None = None
    """Times to predict with, instead of those of the device's profile."""

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def target(self) -> Target:
        """With the recipe's options; a component's own may have another precision."""
        return self.resolved.target

    @property
    def groups(self) -> int:
        """How many groups the denoising steps are divided into."""
        return self.components["transformer"].passes.groups

    @functools.cached_property
    def sampling(self) -> Sampling:
        """The calls of the denoiser, and the ranges of blocks that they reuse.

        Raises:
            RecipeError: there are fewer calls than groups, a range is none, or a step needs what no earlier one
                computed, or a function that there is not.
        """
        own = self.components["transformer"]
        ranges = find_ranges(self.recipe.sampler.reuse, own.blocks, own.target)
        found = sampling(self.recipe, self.resolved.family, self.groups, ranges)
        have = {function for block in own.blocks if block.rate == STEP for function in block.functions}
        missing = next((s for s in found.steps if s.function not in have), None)
        if missing is not None:
            raise RecipeError(
                f"transformer.passes: step {missing.index} asks for the function '{missing.function}', which they do "
                f"not provide in this order; there are {', '.join(sorted(have))}"
            )
        return found

    @property
    def steps(self) -> tuple[Step, ...]:
        """The calls of the denoiser; raises as :attr:`sampling`."""
        return self.sampling.steps

    @functools.cached_property
    def loading(self) -> Predicted:
        """What is loaded, run and freed for a whole video, and what that is predicted to cost.

        Raises:
            RecipeError: the budget is too small for a block: names it, its function and the least that works. Or the
                device is unknown, or has no throughput for a precision.
            BundleError: the calibration is of another bundle.
        """
        return predict_video(self, self.resolved.device, self.resolved.memory_budget, self.measured)

    def check_loading(self) -> None:
        """Plan loading now, so that what cannot be is refused before anything is built. Raises as :attr:`loading`."""
        _ = self.loading

    def timesteps_of(self, function: str) -> list[float]:
        """Timesteps of the steps that call a function of the denoiser; where none does, of all steps of its group."""
        steps = self.steps
        calls = [s.t for s in steps if s.function == function]
        divided = enumerate(groups_of(steps, self.groups))
        return calls or [s.t for k, group in divided if function == grouped(ungrouped(function), k) for s in group]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in the order in which components and blocks run."""
        return tuple(b for c in self.components.values() for b in c.blocks)


def plan(
    recipe: Recipe,
    *,
    base: str | Path | None = None,
    listener: Listener | None = None,
    calibration: str | Path | None = None,
) -> Plan:
    """Everything up to lowering.

    Args:
        base: folder that relative checkpoint paths are looked for in first.
        listener: is shown the graphs.
        calibration: a file of measured times, to predict with.

    Raises:
        SoraCompileError: the recipe cannot be built; says why.
    """
    measured = None if calibration is None else load_times(Path(calibration))
    build = resolve(recipe, Path(base or "."), checkpoints=False)
    found = plan_resolved(build, listener, measured)
    found.check_loading()
    return found


def plan_resolved(build: ResolvedBuild, listener: Listener | None = None, measured: TimesFile | None = None) -> Plan:
    """As :func:`plan`, for a build whose parts are found already; loading is planned when it is looked at."""
    listener = listener or Listener()
    definitions = build.family.define(build.recipe, build.configs)
    found = Plan(build, {n: _component(build.components[n], d, listener) for n, d in definitions.items()}, measured)
    _ = found.sampling  # refused now, not when all is built
    return found


def _component(part: ResolvedComponent, definition: Definition, listener: Listener) -> ComponentPlan:
    graphs: list[Graph] = []
    pairs: list[BlockPair] = []
    for graph in rewritten_graphs(definition, part.passes, part.target, listener):
        legal, plain = lower_graph(graph, part.passes, part.target, listener)
        graphs.append(legal)
        pairs += map(BlockPair, extract_blocks(legal), extract_blocks(plain))
    memory = block_memory([p.lowered for p in pairs], part.target)
    return ComponentPlan(part, definition, tuple(graphs), tuple(pairs), memory)


def capture_forms(forms: Forms) -> Graph:
    """One graph of a component, with a function for each of its forms."""
    graph = capture(forms.base)
    for name, form in forms.others.items():
        graph = with_function(graph, name, capture(form))
    return graph


def rewritten_graphs(
    definition: Definition, passes: Pipeline, target: Target, listener: Listener | None = None
) -> list[Graph]:
    """A component's graphs, captured and rewritten by its passes; not legalised, and not cut.

    Raises:
        LoweringError: a pass cannot be applied.
    """
    listener = listener or Listener()
    graphs = [capture_forms(forms).stored_as(target.storage) for forms in definition.forms]
    for graph in graphs:
        listener.graph(definition.name, "capture", graph)
    for rewrite in passes.rewrites:
        graphs = [rewrite(graph, beside=[g for g in graphs if g is not graph]) for graph in graphs]
        for graph in graphs:
            listener.graph(definition.name, str(rewrite), graph)
    return graphs


def lower_graph(
    graph: Graph, passes: Pipeline, target: Target, listener: Listener | None = None
) -> tuple[Graph, Graph]:
    """Cut a rewritten graph, ``legalise`` with the target's forms before the partition.

    Returns:
        The partitioned graph, and the same without legalisation.

    Raises:
        RecipeError: a weight is to be kept, or a layer to round, in a way that the target cannot express.
        LoweringError: the partition cannot be applied.
    """
    listener = listener or Listener()
    if target.int8_inputs_refusal is not None and scale_sources(graph.weights):
        raise RecipeError(
            f"{graph.component}: activations are to be rounded to int8 with fixed scales, which target '{target.name}' "
            f"does not do: {target.int8_inputs_refusal}; leave out 'activations'"
        )
    legal = _kept(legalise(graph, target.forms), target)
    listener.graph(graph.component, "legalise", legal)
    partition = passes.partition.chosen_for(legal, target)
    cut = partition(legal)
    listener.graph(graph.component, str(passes.partition), cut)
    return cut, partition(graph)


def _kept(graph: Graph, target: Target) -> Graph:
    """The legal graph with every weight kept as its target does; refuses what that cannot express."""
    uses = weight_uses(graph)
    weights = {}
    for name, weight in graph.weights.items():
        use = uses[name].use if name in uses else "other"
        try:
            storage = kept_storage(weight, use, target)
        except UnsupportedStorageError as e:
            raise RecipeError(f"{graph.component}: weight '{name}' is to be kept as {weight.storage}, {e}") from e
        weights[name] = dataclasses.replace(weight, storage=storage)
    return dataclasses.replace(graph, weights=weights)


def kept_storage(weight: Weight, use: Use, target: Target) -> Storage:
    """How ``target`` keeps a weight of a legal graph.

    Raises:
        UnsupportedStorageError: it cannot, or the weight's shape does not fit; says what is taken.
    """
    if refusal := weight.storage.refusal(weight.shape):
        raise UnsupportedStorageError(f"but {refusal}")
    try:
        return target.keep(weight.storage, use)
    except UnsupportedStorageError as e:
        cannot = f"which target '{target.name}' with precision {target.precision} cannot"
        raise UnsupportedStorageError(f"{cannot}; for {_KINDS[use]}, {e}") from e


_KINDS: Mapping[Use, str] = {
    "linear": "the matrix of a linear layer",
    "convolution": "the weight of a convolution",
    "embedding": "a table that is looked up",
    "other": "such a weight",
}
