"""A component's calibration: its blocks run on several inputs, one after the other, through the store.

Two sorts of entries for each block: what it gave on every run (``forward``), which goes as soon as no later block takes
it, and the sums over what came into its layers (``sums``). A calibration that was stopped goes on with what is not
there yet. When all blocks are done, one entry has what is known of every weight, and the others go. In memory are a
block's weights, its activations in one run, and the sums.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from toolchain.accuracy.references import Values, sample_inputs
from toolchain.accuracy.statistics import Range, Watched
from toolchain.build.tables import component_tables, tables_origin
from toolchain.errors import LoweringError
from toolchain.ir.activations import ScaleSource, scale_of
from toolchain.ir.blocks import Block
from toolchain.ir.calibration import Calibrated, Calibration, coarse, derived, derived_moments
from toolchain.ir.feeds import Timestep
from toolchain.ir.graph import Graph
from toolchain.ir.storage import Need
from toolchain.ir.target import package_versions
from toolchain.ir.weights import Weight, WeightSource
from toolchain.listener import Listener
from toolchain.planning.plan import ComponentPlan, Plan
from toolchain.system.code import code_digest
from toolchain.system.memory import release
from toolchain.system.store import Entry, NewEntry, Store, clone_or_copy, key_of
from toolchain.weights.block_weights import BlockWeights
from toolchain.weights.digests import block_digest

KIND = "calibrations"
SUMS, IMPORTANCE, MOMENTS = "sums.safetensors", "importance.safetensors", "moments_{}.safetensors"


@dataclass(frozen=True)
class Run:
    """One run of a function: on the ``number``-th input, at a timestep of the recipe's schedule where it takes one."""

    function: str
    number: int
    timestep: float | None


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
        self._wholes = {_tensors(m.source): i for i, m in enumerate(self.measured) if not m.source.is_part}

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
        place = self._places.get(source, self._wholes.get(_tensors(source)))
        if place is None:
            names = ", ".join(source.tensors)
            raise LoweringError(f"no linear layer, convolution or table of the model reads '{names}' as it is")
        return place


def calibrate(
    planned: Plan, component: str, store: Store, digests: Mapping[str, str], listener: Listener | None = None
) -> ComponentCalibration:
    """What is known of a component's activations, by its recipe's calibration; measured now if need be.

    Args:
        digests: of the checkpoint's tensors.

    Raises:
        LoweringError: the passes name no calibration, or the model gives numbers that are NaN or infinite.
    """
    plan = planned.components[component]
    if plan.passes.calibration is None:
        raise LoweringError(f"{component}: no pass has a calibration")
    work = _Work(planned, plan, plan.passes.calibration, store, digests, listener or Listener())
    return ComponentCalibration(store.get_or_make(KIND, work.key, work.make))


class _Work:
    """A calibration that is to be done."""

    def __init__(
        self,
        planned: Plan,
        plan: ComponentPlan,
        asked: Calibration,
        store: Store,
        digests: Mapping[str, str],
        listener: Listener,
    ) -> None:
        self._plan, self._store, self._listener = plan, store, listener
        wanted = {_tensors(w.source) for b in plan.blocks for w in b.weights.values() if w.storage.needs == "moments"}
        blocks = {pair.name: _plainly(pair.plain) for pair in plan.pairs}
        family = planned.resolved.family
        self._chains = [
            _Chain(
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
        found: dict[WeightSource, _Sum] = {}
        entries: list[Entry] = []
        for number, chain in enumerate(self._chains):
            key = functools.partial(self._key, number)
            for block in chain.blocks:
                self._listener.working(name, block.name, "calibrate")
                entry = chain.sums(block, key, tables)
                entries.append(entry)
                for source, own in _read_sums(entry):
                    found[source] = found[source].with_(own) if source in found else own
                self._listener.finished(name, block.name, None)
        measured = [self._write(folder, place, source, own) for place, (source, own) in enumerate(found.items())]
        save_file({str(i): coarse(own.importance) for i, own in enumerate(found.values())}, folder / IMPORTANCE)
        for entry in entries:
            self._store.remove(entry)
        return NewEntry({"measured": measured})

    def _key(self, graph: int, what: str, block: Block) -> str:
        return key_of({**self._parts, "what": what, "graph": graph, "block": block.name})

    def _write(self, folder: Path, place: int, source: WeightSource, own: _Sum) -> dict[str, Any]:
        """A weight's second moments, if they are wanted; gives what the entry says of it."""
        digests = {"importance": _digest(coarse(own.importance))}
        if own.moments is not None:
            moments = (load_file(own.moments[0])[own.moments[1]] / own.count).float()
            save_file({"moments": moments}, folder / MOMENTS.format(place))
            digests["moments"] = _digest(moments)
        return {"source": _source_data(source), "ranges": own.ranges, "digests": digests}


class _Chain:
    """A graph's blocks in a row."""

    def __init__(
        self,
        plan: ComponentPlan,
        store: Store,
        blocks: list[Block],
        runs: list[Run],
        inputs: Callable[[Run], Values],
        wanted: set[tuple[object, ...]],
    ) -> None:
        self._plan, self._store, self.blocks, self.runs = plan, store, blocks, runs
        self._inputs, self._wanted = inputs, wanted
        self._by_name = {b.name: b for b in blocks}

    def sums(self, block: Block, key: Callable[[str, Block], str], tables: Values) -> Entry:
        """The entry of a block's sums, made now if need be; what no later block takes is removed."""
        known = self._store.get(KIND, key("sums", block))
        if known is not None:
            return known
        missing: set[str] = set()
        left = [block.name]
        while left:
            name = left.pop()
            if name not in missing and self._store.get(KIND, key("forward", self._by_name[name])) is None:
                missing.add(name)
                left += _before(self._by_name[name]) & self._by_name.keys()
        for each in (b for b in self.blocks if b.name in missing | {block.name}):
            make = functools.partial(self._run, each, key, tables)
            forward = self._store.get_or_make(KIND, key("forward", each), make)
        found = self._store.get_or_make(KIND, key("sums", block), functools.partial(_taken, forward))
        at = self.blocks.index(block)
        later = {name for b in self.blocks[at + 1 :] for name in _before(b)}
        for each in (b for b in self.blocks[: at + 1] if b.name not in later):
            gone = self._store.get(KIND, key("forward", each))
            if gone is not None:
                self._store.remove(gone)
        return found

    def _run(self, block: Block, key: Callable[[str, Block], str], tables: Values, folder: Path) -> NewEntry:
        """Run a block on all inputs: what it gave, and the sums."""
        before = {n: self._by_name[n] for n in _before(block) & self._by_name.keys()}
        folders = {n: self._store.get(KIND, key("forward", b)) for n, b in before.items()}
        weights = dict(BlockWeights(block, self._plan.resolved.checkpoint, self._plan.definition.aliases))
        products = {n for n, w in block.weights.items() if _tensors(w.source) in self._wanted and len(w.shape) == 2}
        watched = Watched(block, weights, products)
        ranges: dict[str, list[list[Any]]] = {}
        for number, run in enumerate(self.runs):
            given = {f"inputs.{n}": v for n, v in self._inputs(run).items()}
            given |= {f"tables.{n}": v for n, v in tables.items()}
            inputs = {
                port: given[source] if source in given else _port(folders, source, number)
                for port, source in block.sources.items()
            }
            outputs, met = watched.run(run.function, inputs)
            if not all(bool(torch.isfinite(v).all()) for v in outputs.values() if v.is_floating_point()):
                raise LoweringError(
                    f"{block.component}: calibration: block '{block.name}' gives numbers that are NaN or infinite"
                )
            save_file({n: v.contiguous().clone() for n, v in outputs.items()}, folder / _run_file(number))
            for name, found in met.items():
                ranges.setdefault(name, []).append([dataclasses.astuple(run), dataclasses.astuple(found)])
        kept: Values = {}
        layers: list[dict[str, Any]] = []
        for name, total in watched.totals.items():
            assert total.squares is not None
            kept[f"{len(layers)}.squares"] = total.squares
            if total.products is not None:
                kept[f"{len(layers)}.products"] = total.products
            source = _source_data(block.weights[name].source)
            layers.append({"source": source, "count": total.count, "ranges": ranges.get(name, [])})
        save_file(kept, folder / SUMS)
        release()
        return NewEntry({"layers": layers})


@dataclass(frozen=True)
class _Sum:
    """What a weight's layer was given in all runs: sums of squares, and where a file has the sums of products."""

    count: int
    squares: torch.Tensor
    moments: tuple[Path, str] | None
    ranges: list[list[Any]]

    def with_(self, other: _Sum) -> _Sum:
        """Both, of a weight that several layers read."""
        if self.moments is not None:
            raise LoweringError(
                "second moments of a weight that several blocks read are not kept; leave it out by a rule"
            )
        return _Sum(self.count + other.count, self.squares + other.squares, None, [*self.ranges, *other.ranges])

    @property
    def importance(self) -> torch.Tensor:
        """Mean squares, float64."""
        return self.squares / max(1, self.count)


def _read_sums(entry: Entry) -> Iterator[tuple[WeightSource, _Sum]]:
    path = entry.data / SUMS
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for i, layer in enumerate(entry.meta["layers"]):
            moments = (path, f"{i}.products") if f"{i}.products" in names else None
            own = _Sum(layer["count"], file.get_tensor(f"{i}.squares"), moments, layer["ranges"])
            yield _source(layer["source"]), own


def _taken(forward: Entry, folder: Path) -> NewEntry:
    """The sums alone, out of what a block's run left."""
    clone_or_copy(forward.data / SUMS, folder / SUMS)
    return NewEntry(forward.meta)


def _port(folders: Mapping[str, Entry | None], source: str, run: int) -> torch.Tensor:
    """What a block gave in a run."""
    block, _, port = source.partition(".")
    entry = folders[block]
    assert entry is not None
    with safe_open(entry.data / _run_file(run), framework="pt") as file:
        value: torch.Tensor = file.get_tensor(port)
    return value


def _run_file(number: int) -> str:
    return f"run_{number}.safetensors"


def _before(block: Block) -> set[str]:
    """The blocks (and other places) that a block's inputs come from."""
    return {source.partition(".")[0] for source in block.sources.values()}


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


def _tensors(source: WeightSource) -> tuple[object, ...]:
    """What a part of a weight has in common with the whole."""
    return (*source.tensors, source.concat if len(source.tensors) > 1 else 0)


def _source_data(source: WeightSource) -> list[Any]:
    return json.loads(json.dumps(dataclasses.astuple(source)))  # type: ignore[no-any-return]


def _source(data: list[Any]) -> WeightSource:
    tensors, shape, select, narrow, concat = data
    parts = tuple((int(d), int(i)) for d, i in select)
    pieces = tuple((int(d), int(s), int(n)) for d, s, n in narrow)
    return WeightSource(tuple(tensors), tuple(shape), parts, pieces, concat)


def _measured(data: Mapping[str, Any]) -> Measured:
    ranges = tuple((Run(*run), Range(*found)) for run, found in data["ranges"])
    return Measured(_source(data["source"]), ranges, data["digests"])


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(f"{list(value.shape)}\n".encode() + value.contiguous().numpy().tobytes()).hexdigest()
