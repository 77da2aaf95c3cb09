"""A graph's blocks run on several inputs, one after the other, through the store: what came into their layers, summed.

Two sorts of entries for each block: what it gave on every run (``forward``), which goes as soon as no later block takes
it, and the sums (``sums``). What was stopped goes on with what is not there yet. In memory are a block's weights, its
activations in one run, and the sums.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from toolchain.accuracy.references import Values
from toolchain.accuracy.statistics import Watched
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block
from toolchain.ir.weights import WeightSource
from toolchain.planning.plan import ComponentPlan
from toolchain.system.memory import release
from toolchain.system.store import Entry, NewEntry, Store, clone_or_copy
from toolchain.weights.block_weights import BlockWeights

KIND = "calibrations"
SUMS = "sums.safetensors"


@dataclass(frozen=True)
class Run:
    """One run of a function: on the ``number``-th input, at a timestep of the recipe's schedule where it takes one."""

    function: str
    number: int
    timestep: float | None


class Chain:
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
        products = {n for n, w in block.weights.items() if tensors_of(w.source) in self._wanted}
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
            source = source_data(block.weights[name].source)
            layers.append({"source": source, "count": total.count, "ranges": ranges.get(name, [])})
        save_file(kept, folder / SUMS)
        release()
        return NewEntry({"layers": layers})


@dataclass(frozen=True)
class Sum:
    """What a weight's layer was given in all runs: sums of squares, and where a file has the sums of products."""

    count: int
    squares: torch.Tensor
    moments: tuple[Path, str] | None
    ranges: list[list[Any]]

    def with_(self, other: Sum) -> Sum:
        """Both, of a weight that several layers read."""
        if self.moments is not None:
            raise LoweringError(
                "second moments of a weight that several blocks read are not kept; leave it out by a rule"
            )
        return Sum(self.count + other.count, self.squares + other.squares, None, [*self.ranges, *other.ranges])

    @property
    def importance(self) -> torch.Tensor:
        """Mean squares, float64."""
        return self.squares / max(1, self.count)


def read_sums(entry: Entry) -> Iterator[tuple[WeightSource, Sum]]:
    path = entry.data / SUMS
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for i, layer in enumerate(entry.meta["layers"]):
            moments = (path, f"{i}.products") if f"{i}.products" in names else None
            own = Sum(layer["count"], file.get_tensor(f"{i}.squares"), moments, layer["ranges"])
            yield source_of(layer["source"]), own


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


def tensors_of(source: WeightSource) -> tuple[object, ...]:
    """What a part of a weight has in common with the whole."""
    return (*source.tensors, source.concat if len(source.tensors) > 1 else 0)


def source_data(source: WeightSource) -> list[Any]:
    return json.loads(json.dumps(dataclasses.astuple(source)))  # type: ignore[no-any-return]


def source_of(data: list[Any]) -> WeightSource:
    tensors, shape, select, narrow, concat = data
    parts = tuple((int(d), int(i)) for d, i in select)
    pieces = tuple((int(d), int(s), int(n)) for d, s, n in narrow)
    return WeightSource(tuple(tensors), tuple(shape), parts, pieces, concat)
