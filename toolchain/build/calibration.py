"""A component's calibration: what its recipe's passes want to know of its activations, measured once.

Blocks are run through the store (:mod:`toolchain.build.calibration_chain`). When all are done, one entry has what is
known of every weight, and theirs go.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from toolchain.accuracy.references import Values, sample_inputs
from toolchain.accuracy.statistics import Range
from toolchain.build.calibration_chain import (
    KIND,
    Chain,
    Run,
    Sum,
    read_sums,
    source_data,
    source_of,
    tensors_of,
)
from toolchain.build.tables import component_tables, tables_origin
from toolchain.errors import LoweringError
from toolchain.formats.recipe import Recipe
from toolchain.ir.activations import ScaleSource, scale_of
from toolchain.ir.blocks import Block
from toolchain.ir.calibration import Calibrated, Calibration, coarse, derived, derived_moments
from toolchain.ir.feeds import Timestep
from toolchain.ir.graph import Graph
from toolchain.ir.storage import Need
from toolchain.ir.target import package_versions
from toolchain.ir.weights import Weight, WeightSource
from toolchain.listener import Listener
from toolchain.planning.plan import ComponentPlan, Plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.code import code_digest
from toolchain.system.events import What
from toolchain.system.store import Entry, NewEntry, Store, key_of
from toolchain.weights.block_digests import block_digest
from toolchain.weights.digests import tensor_digests

IMPORTANCE, MOMENTS = "importance.safetensors", "moments_{}.safetensors"


@dataclass(frozen=True)
class Measured:
    """What is known of a weight: its layer's ranges, run by run, and digests of its statistics by what needs them."""

    source: WeightSource
    ranges: tuple[tuple[Run, Range], ...]
    digests: Mapping[str, str]


class ComponentCalibration(Calibrated):
    """What was measured of a component, read from its entry when it is asked for."""

    def __init__(self, entry: Entry) -> None:
        self._folder = entry.data
        self.measured = tuple(_measured(data) for data in entry.meta["measured"])
        self._places = {m.source: i for i, m in enumerate(self.measured)}
        self._wholes = {tensors_of(m.source): i for i, m in enumerate(self.measured) if not m.source.is_part}

    def statistic(self, source: WeightSource, need: Need) -> torch.Tensor:
        place = self._place(source)
        measured = self.measured[place].source
        if need == "importance":
            with safe_open(self._folder / IMPORTANCE, framework="pt") as file:
                return derived(source, measured, file.get_tensor(str(place)))
        path = self._folder / MOMENTS.format(place)
        if not path.exists():
            raise LoweringError(f"'{source.tensors[0]}' is no linear layer's, which alone second moments are kept of")
        return derived_moments(source, measured, load_file(path)["moments"])

    def digest(self, source: WeightSource, need: Need) -> str:
        """The digest of what :meth:`statistic` is made of.

        Raises:
            LoweringError: as :meth:`statistic`.
        """
        found = self.measured[self._place(source)].digests.get(need)
        if found is None:
            raise LoweringError(f"'{source.tensors[0]}' is no linear layer's, which alone second moments are kept of")
        return found

    def scale(self, source: ScaleSource) -> torch.Tensor:
        runs = self.ranges(source.layer)
        met = [r for run, r in runs if source.function in (None, run.function)]
        if not met:
            names = ", ".join(source.layer.tensors)
            raise LoweringError(f"the layer of '{names}' was not run in function '{source.function}'")
        return torch.tensor(scale_of(max(max(-r.low, r.high) for r in met)))

    def ranges(self, source: WeightSource) -> tuple[tuple[Run, Range], ...]:
        """What came into the layer of a weight (or of the one that it is a part of) and what it gave, run by run.

        Raises:
            LoweringError: nothing was measured for the weight; names its tensors.
        """
        return self.measured[self._place(source)].ranges

    def _place(self, source: WeightSource) -> int:
        """Where a weight is among those that were measured: itself, or the one that it is a part of."""
        place = self._places.get(source, self._wholes.get(tensors_of(source)))
        if place is None:
            names = ", ".join(source.tensors)
            raise LoweringError(f"no linear layer, convolution or table of the model reads '{names}' as it is")
        return place


def calibrate(
    planned: Plan,
    component: str,
    store: Store,
    digests: Mapping[str, str],
    listener: Listener | None = None,
    *,
    asked: Calibration | None = None,
    weights: Iterable[Weight] | None = None,
) -> ComponentCalibration:
    """What is known of a component's activations, measured now if need be.

    Args:
        digests: of the checkpoint's tensors.
        asked: on which inputs; those that the recipe's passes name if None.
        weights: what is going to be encoded; all of the plan's if None. Second moments are measured for these alone.

    Raises:
        LoweringError: the passes name no calibration, or the model gives numbers that are NaN or infinite.
    """
    plan = planned.components[component]
    asked = asked or plan.passes.calibration
    if asked is None:
        raise LoweringError(f"{component}: no pass has a calibration")
    if weights is None:
        weights = (w for block in plan.blocks for w in block.weights.values())
    wanted = {tensors_of(w.source) for w in weights if w.storage.needs == "moments"}
    work = _Work(planned, plan, asked, wanted, store, digests, listener or Listener())
    return ComponentCalibration(store.get_or_make(KIND, work.key, work.make, What("calibration", component)))


def calibrate_recipe(recipe: Recipe, base: Path, component: str) -> ComponentCalibration:
    """As :func:`calibrate`, for a component of a recipe, through the user's cache.

    Raises:
        SoraCompileError: the recipe cannot be built; says why.
    """
    planned, store = plan_resolved(resolve(recipe, base, checkpoints=True)), Store()
    return calibrate(
        planned, component, store, tensor_digests(planned.resolved.components[component].checkpoint, store)
    )


class _Work:
    """A calibration that is to be done; ``wanted`` are the tensors whose layers' second moments are."""

    def __init__(
        self,
        planned: Plan,
        plan: ComponentPlan,
        asked: Calibration,
        wanted: set[tuple[object, ...]],
        store: Store,
        digests: Mapping[str, str],
        listener: Listener,
    ) -> None:
        self._plan, self._store, self._listener = plan, store, listener
        blocks = {pair.name: _plainly(pair.plain) for pair in plan.pairs}
        family = planned.resolved.family
        self._chains = [
            Chain(
                plan,
                store,
                [blocks[name] for name in graph.blocks()],
                [Run(f, k, t) for f in graph.functions for k, t in enumerate(_timesteps(planned, graph, f, asked))],
                functools.partial(_inputs, graph, sample_inputs(graph, family, asked.seed)),
                wanted,
            )
            for graph in plan.graphs
        ]
        aliases = plan.definition.aliases
        passes = {type(p).__module__ for p in plan.passes}
        self._parts = {
            "blocks": [[n, b.structure(), block_digest(b, digests, aliases)] for n, b in blocks.items()],
            "tables": tables_origin(planned, plan, digests),
            "runs": [[dataclasses.astuple(run) for run in chain.runs] for chain in self._chains],
            "seed": asked.seed,
            "moments": sorted(map(str, wanted)),
            "tools": package_versions("torch"),
            "code": code_digest("toolchain.build.calibration", type(family).__module__, *sorted(passes)),
        }
        self.key = key_of({**self._parts, "what": "whole"})

    def make(self, folder: Path) -> NewEntry:
        """Measure everything, into ``folder``."""
        tables = component_tables(self._plan)
        name = self._plan.name
        self._listener.start(name, [b.name for chain in self._chains for b in chain.blocks])
        found: dict[WeightSource, Sum] = {}
        entries: list[Entry] = []
        for number, chain in enumerate(self._chains):
            key = functools.partial(self._key, number)
            for block in chain.blocks:
                self._listener.working(name, block.name, "calibrate")
                entry = chain.sums(block, key, tables)
                entries.append(entry)
                for source, own in read_sums(entry):
                    found[source] = found[source].with_(own) if source in found else own
                self._listener.finished(name, block.name, None)
        measured = [self._write(folder, place, source, own) for place, (source, own) in enumerate(found.items())]
        save_file({str(i): coarse(own.importance) for i, own in enumerate(found.values())}, folder / IMPORTANCE)
        for entry in entries:
            self._store.remove(entry)
        return NewEntry({"measured": measured})

    def _key(self, graph: int, what: str, block: Block) -> str:
        return key_of({**self._parts, "what": what, "graph": graph, "block": block.name})

    def _write(self, folder: Path, place: int, source: WeightSource, own: Sum) -> dict[str, Any]:
        """A weight's second moments, if they are wanted; gives what the entry says of it."""
        digests = {"importance": _digest(coarse(own.importance))}
        if own.moments is not None:
            moments = (load_file(own.moments[0])[own.moments[1]] / own.count).float()
            save_file({"moments": moments}, folder / MOMENTS.format(place))
            digests["moments"] = _digest(moments)
        return {"source": source_data(source), "ranges": own.ranges, "digests": digests}


def _plainly(block: Block) -> Block:
    """A block that rounds nothing and says nothing of how its weights are kept, so that schemes share a calibration."""
    block = block.unrounded()
    return dataclasses.replace(block, weights={n: Weight(w.source) for n, w in block.weights.items()})


def _timesteps(planned: Plan, graph: Graph, function: str, asked: Calibration) -> list[float | None]:
    """The timestep of each input of a function: spread over the steps that call it."""
    if not any(isinstance(spec.feed, Timestep) for spec in graph.inputs):
        return [None] * asked.inputs
    calls = planned.timesteps_of(function)
    return [calls[(2 * k + 1) * len(calls) // (2 * asked.inputs)] for k in range(asked.inputs)]


def _inputs(graph: Graph, drawn: Callable[[str, int], Values], run: Run) -> Values:
    """A component's inputs in a run."""
    values = drawn(run.function, run.number)
    if run.timestep is not None:
        times = (spec for spec in graph.inputs_of(run.function) if isinstance(spec.feed, Timestep))
        values |= {spec.name: torch.full(spec.shape, run.timestep) for spec in times}
    return values


def _measured(data: Mapping[str, Any]) -> Measured:
    ranges = tuple((Run(*run), Range(*found)) for run, found in data["ranges"])
    return Measured(source_of(data["source"]), ranges, data["digests"])


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(f"{list(value.shape)}\n".encode() + value.contiguous().numpy().tobytes()).hexdigest()
