"""A block's passage through the gate, remembered by the store: what passed once is not executed again."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.accuracy import goldens
from toolchain.accuracy.metrics import compare, measure, require, require_price, worst
from toolchain.accuracy.references import Case, References, Run, Weights, every_run, sample_inputs, stored_case
from toolchain.build.artifacts import ARTIFACT_STEM, Builder
from toolchain.build.tables import table_digests
from toolchain.errors import AccuracyError, LoweringError, RecipeError
from toolchain.formats import manifest as m
from toolchain.formats.recipe import QUANTIZATION_DEFAULT, Recipe
from toolchain.formats.schedule import BASE
from toolchain.ir.blocks import Block, BlockPair, scales
from toolchain.ir.dtypes import FLOAT16_MAX
from toolchain.ir.feeds import Timestep
from toolchain.ir.graph import Graph
from toolchain.ir.target import Engine, EngineUnavailableError
from toolchain.listener import Listener
from toolchain.planning.plan import Plan
from toolchain.system.code import code_digest
from toolchain.system.events import What
from toolchain.system.memory import release
from toolchain.system.store import Entry, NewEntry, key_of

GOLDENS = "goldens.safetensors"
CROWDED = 0.5
"""Share of float16's range from which on a user is told."""


@dataclass(frozen=True)
class Passed:
    """What the gate found out about a block; ``goldens`` is the file to put into the bundle, if there is one."""

    accuracy: dict[str, m.Accuracy]
    quantization: dict[str, m.Accuracy] | None
    activations: dict[str, m.Activations]
    goldens: Path | None


class ComponentGate:
    """Holds a component's artifacts against eager float32, in the order of its blocks.

    Args:
        tables: the component's values known at build time.
    """

    def __init__(self, builder: Builder, planned: Plan, tables: Mapping[str, torch.Tensor], listener: Listener) -> None:
        self._builder, self._recipe, self._tables, self._listener = builder, planned.recipe, tables, listener
        self._family = planned.resolved.family
        self._planned = planned
        self._table_digests = table_digests(tables)
        self._price_limit = planned.recipe.gate.max_quantization_error.get(builder.plan.name, QUANTIZATION_DEFAULT)
        self._graphs = {name: graph for graph in builder.plan.graphs for name in graph.blocks()}
        self._first: dict[str, str] = {}
        self._references: dict[str, References] = {}
        self._chain: dict[str, list[Any]] = {}
        """What decides a block's activations, by block: itself and what was executed before it."""
        for graph in builder.plan.graphs:
            self._start(graph, [pair for pair in builder.plan.pairs if self._graphs[pair.name] is graph])

    def _start(self, graph: Graph, pairs: Sequence[BlockPair]) -> None:
        seen: dict[tuple[str, str], str] = {}
        for pair in pairs:
            self._first[pair.name] = seen.setdefault((pair.lowered.structure(), pair.plain.structure()), pair.name)
        inputs = sample_inputs(graph, self._family, self._recipe.gate.seed, stretches(graph, self._planned))
        blocks = [pair.plain.unrounded() for pair in pairs]
        runs = self._every_run(graph)
        references = References(blocks, runs, inputs, self._tables, self._builder.weights, self._first)
        chain: list[Any] = []
        for pair in pairs:
            self._references[pair.name], self._chain[pair.name] = references, chain

    def _every_run(self, graph: Graph) -> list[Run]:
        """All that a block can be executed on; with gate ``structure`` one input for each function."""
        return every_run(graph.functions, 1 if self._recipe.gate.mode == "structure" else self._recipe.gate.inputs)

    def _runs_of(self, pair: BlockPair, artifact: Entry) -> list[Run]:
        """What a block is executed on, as the gate's mode says; nothing where another one is executed for it.

        Blocks of one structure are one program, of which only the weights differ. So what their functions compute is
        found out on the first of them, and on the others that their weights are the right ones.

        Raises:
            LoweringError: nothing was to be, but the block was lowered by itself, so its program may differ.
        """
        mode, every = self._recipe.gate.mode, self._every_run(self._graphs[pair.name])
        if mode == "release" or self._first[pair.name] == pair.name or self._builder.direct:
            return every
        unbound = artifact.meta.get("unbound")
        if mode == "every":
            return every if unbound else [(BASE, 0)]
        if unbound:
            raise LoweringError(
                f"block '{pair.name}' cannot be stamped ({unbound}), so gate 'structure' cannot "
                "vouch for it; use gate 'every'"
            )
        return []

    def hold(self, pair: BlockPair, artifact: Entry) -> Passed | None:
        """Execute a block's artifact, or take it from the store that it was. To be asked for every block, in order.

        With gate ``structure`` a program that was executed once is not executed again for another checkpoint. What
        was measured then is not this checkpoint's, so it is none of the bundle's, whose bytes shall not depend on
        what is in the store.

        Returns:
            What goes into the bundle; None with gate ``structure``, and where this machine has no engine.

        Raises:
            AccuracyError: names the block, the function, the figures and the step where it goes wrong.
            LoweringError: the block cannot be vouched for, see :meth:`_runs_of`; or it fails when run.
        """
        block, runs = pair.lowered, self._runs_of(pair, artifact)
        self._references[block.name].only(block.name, runs)
        if not runs:
            return None
        exact = pair.plain.unrounded()
        self._chain[block.name].append([block.name, exact.structure(), self._builder.weights_digest(exact), runs])
        self._listener.working(block.component, block.name, "execute")
        thorough = runs == self._every_run(self._graphs[block.name])
        key = self._key(pair, artifact, runs)
        try:
            make = functools.partial(self._execute, pair, artifact, thorough)
            found = self._builder.store.get_or_make("gates", key, make, What("gate", block.component, block.name))
        except EngineUnavailableError as e:
            self._listener.remark(f"{self._builder.plan.target.name}: not executed: {e}")
            return None
        limit, price = self._limit(block), found.meta["quantization"]
        accuracy = {f: m.Accuracy(**a | {"limit": limit}) for f, a in found.meta["accuracy"].items()}
        quantization = price and {f: m.Accuracy(**a | {"limit": self._price_limit}) for f, a in price.items()}
        for function, figures in accuracy.items():
            where = f"{block.component}: block '{block.name}', function '{function}'"
            try:
                require(where, figures)
            except AccuracyError as e:
                raise AccuracyError(f"{e}; {self._explain(pair, artifact, function)}") from e
            if quantization:
                require_price(where, block.component, quantization[function])
        activations = {f: m.Activations(**a) for f, a in found.meta["activations"].items()}
        self._warn(block, activations)
        if self._recipe.gate.mode == "structure":
            return None
        has_goldens = any(file.path == GOLDENS for file in found.files)
        return Passed(accuracy, quantization, activations, found.data / GOLDENS if has_goldens else None)

    def _key(self, pair: BlockPair, artifact: Entry, runs: Sequence[Run]) -> str:
        """What the store knows the result by: all that decides it."""
        gate, graph = self._recipe.gate, self._graphs[pair.name]
        program: dict[str, Any] = {
            "artifact": artifact.key,
            "chain": self._chain[pair.name],
            "tables": self._table_digests,
            "of": self._every_run(graph),
        }
        if gate.mode == "structure" and not self._builder.direct:
            program = {"template": self._builder.template_key(pair.lowered), "plain": pair.plain.structure()}
        # artifacts do not depend on the code that executes and measures them, but results do
        code = code_digest("toolchain.build.gate", type(self._builder.plan.target).__module__)
        inputs = [gate.seed, runs, *sorted(stretches(graph, self._planned).items())]
        return key_of(program | {"inputs": inputs, "code": code})

    def _engine(self, block: Block, artifact: Entry) -> Engine:
        target = self._builder.plan.target
        return target.engine(artifact.data / f"{ARTIFACT_STEM}{target.suffix}", block.inputs, block.outputs)

    def _execute(self, pair: BlockPair, artifact: Entry, thorough: bool, folder: Path) -> NewEntry:
        """``thorough``: on its goldens, too. Else it has those only that are among what it is run on anyway."""
        block, plain = pair.lowered, pair.plain
        engine = self._engine(block, artifact)
        limit = self._limit(block)
        exact = self._references[block.name].cases(block.name)
        ran = {case.function for case in exact}
        functions = [f for f in artifact.meta["functions"] if f in ran]
        weights: Weights = self._builder.weights(plain, stored=block)
        if block.quantized:  # read once for all runs: reading means to encode and decode
            weights = dict(weights)
        cases = [stored_case(plain, case, weights) for case in exact] if block.quantized else exact
        has_goldens = self._recipe.gate.mode != "structure"
        if not has_goldens:
            weights = {}  # the engine expands the same ones: half a gigabyte of a table of words
        accuracy = measure(block, functions, engine, cases, limit)
        if has_goldens:
            chosen = goldens.golden_cases(block, plain, functions, cases, weights if thorough else None)
            if chosen:
                goldens.write(folder / GOLDENS, block, chosen)
            again = [f for f, (_, case) in chosen.items() if not any(case is c for c in cases)]
            if again:
                on_goldens = goldens.run(folder / GOLDENS, block.signatures, again, engine, limit)
                accuracy = {f: worst([a, on_goldens.get(f, a)]) for f, a in accuracy.items()}
        release()
        return NewEntry(
            {
                "accuracy": {f: a.model_dump() for f, a in accuracy.items()},
                "quantization": {f: _price(exact, cases, f).model_dump() for f in functions}
                if block.quantized
                else None,
                "activations": {f: _activations(block, exact, f) for f in functions},
            }
        )

    def _limit(self, block: Block) -> float:
        return gate_limit(self._recipe, self._builder.plan.target.arithmetic(block))

    def _explain(self, pair: BlockPair, artifact: Entry, function: str) -> str:
        """Show the table of a function's steps; says which of them is to blame."""
        from toolchain.accuracy.walk import explain

        block = pair.lowered
        case = next(c for c in self._references[block.name].cases(block.name) if c.function == function)
        target, engine = self._builder.plan.target, self._engine(block, artifact)
        if block.quantized:
            case = stored_case(pair.plain, case, self._builder.weights(pair.plain, stored=block))
        found = explain(block, self._builder.weights(block, stored=block), case, engine, target, self._limit(block))
        self._listener.remark(found.text())
        return found.verdict

    def _warn(self, block: Block, activations: Mapping[str, m.Activations]) -> None:
        if self._builder.plan.target.precision != "float16":
            return
        for function, found in activations.items():
            peak = max(abs(found.low), abs(found.high))
            if peak > CROWDED * FLOAT16_MAX:
                self._listener.remark(
                    f"{block.component}/{block.name}: function '{function}' reaches {peak:.3g} at {found.step}; "
                    f"float16 ends at {FLOAT16_MAX:.0f}"
                )


def stretches(graph: Graph, planned: Plan) -> dict[str, tuple[float, float]]:
    """By function, the least and the largest timestep of its group of denoising steps; none if there is one for all."""
    if planned.groups == 1 or not any(isinstance(spec.feed, Timestep) for spec in graph.inputs):
        return {}
    times = {function: planned.timesteps_of(function) for function in graph.functions}
    return {function: (min(own), max(own)) for function, own in times.items()}


def _activations(block: Block, cases: Sequence[Case], function: str) -> dict[str, Any]:
    """The range of a function's activations over its runs, scaled as the artifact scales them."""
    scale = {n.name: s for n, s in scales(block.functions[block.own_function(function)]).items()}
    ranges = [
        (low * scale.get(step, 1.0), high * scale.get(step, 1.0), step)
        for case in cases
        if case.function == function
        for step, (low, high) in case.ranges.items()
    ]
    step = max(ranges, key=lambda r: max(abs(r[0]), abs(r[1])))[2] if ranges else ""
    low, high = min((r[0] for r in ranges), default=0.0), max((r[1] for r in ranges), default=0.0)
    return {"low": float(f"{low:.4g}"), "high": float(f"{high:.4g}"), "step": step}


def _price(exact: Sequence[Case], stored: Sequence[Case], function: str) -> m.Accuracy:
    """What stored weights cost a function: the worst of its runs."""
    both = zip(exact, stored, strict=True)
    return worst([compare(s.outputs, e.outputs, 0.0) for e, s in both if e.function == function])


def gate_limit(recipe: Recipe, precision: str) -> float:
    """The gate's limit for the precision that a block is computed in (:meth:`toolchain.ir.target.Target.arithmetic`).

    Raises:
        RecipeError: the recipe gives none.
    """
    limits = recipe.gate.max_relative_error
    if precision not in limits:
        hint = f"add '{precision}: 0.001' or the like"
        raise RecipeError(f"gate.max_relative_error: no limit for {precision}; {hint}")
    return limits[precision]
