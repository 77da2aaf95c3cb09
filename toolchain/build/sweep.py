"""How much each way to keep each weight costs a component: measured block by block, through the store.

Three sorts of entries for each block: what it gave (``forward``), the gradients by its inputs (``backward``), and the
errors (``errors``). A sweep that was stopped goes on with what is not there yet. Errors of a block need nothing of
another block's, so they may be measured in any process that shares the store.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from toolchain.accuracy.references import References, Values, every_run, sample_inputs
from toolchain.accuracy.sensitivity import Backward, inputs_each, random_direction, squared_errors
from toolchain.build.artifacts import Builder, code_modules
from toolchain.build.calibration import ComponentCalibration, calibrate
from toolchain.build.tables import component_tables, table_digests
from toolchain.ir.blocks import Block
from toolchain.ir.calibration import Calibration
from toolchain.ir.stored import decoding_reader
from toolchain.ir.target import package_versions
from toolchain.ir.weights import Weight
from toolchain.planning.candidates import Candidate, ChoiceGraph, Item, choice_graphs
from toolchain.planning.plan import Plan
from toolchain.system.code import code_digest
from toolchain.system.memory import release
from toolchain.system.store import Entry, NewEntry, key_of
from toolchain.weights.block_weights import reader

KIND = "sweeps"
FILE = "values.safetensors"

Errors = dict[int, list[float | None]]
"""Item of a graph → by candidate, the squared error of the graph's results as a share of their square."""


class Sweep:
    """The errors of a component's weights in every candidate.

    Args:
        builder: of a plan without quantization.
    """

    def __init__(self, builder: Builder, planned: Plan, candidates: Sequence[Candidate]) -> None:
        tables = component_tables(builder.plan)
        choices = choice_graphs(builder.plan, candidates)
        asked = next((c.calibration for c in candidates if c.calibration is not None), None)
        stored = [w for choice in choices for weights in choice.stored for w in weights.values()]
        calibration = _Calibration(builder, planned, asked, stored)
        self.chains = tuple(Chain(builder, planned, i, tables, c, calibration) for i, c in enumerate(choices))

    @property
    def items(self) -> tuple[Item, ...]:
        """All weights that there is a choice for, graph after graph."""
        return tuple(item for chain in self.chains for item in chain.choice.items)

    @property
    def blocks(self) -> tuple[tuple[int, str], ...]:
        """Graph and name of every block with a weight to choose for, the last one of each graph first."""
        return tuple((i, block.name) for i, chain in enumerate(self.chains) for block in reversed(chain.measured))

    def key(self, graph: int, block: str) -> str:
        """What the store knows a block's errors by."""
        return self.chains[graph].errors_key(self.chains[graph].block(block))

    def known(self, graph: int, block: str) -> bool:
        """Whether a block's errors are in the store."""
        return self.chains[graph].builder.store.get(KIND, self.key(graph, block)) is not None

    def prepare(self, graph: int, block: str) -> None:
        """Run what comes before a block, and back from the end what comes after it."""
        self.chains[graph].prepare(self.chains[graph].block(block))

    def measure(self, graph: int, block: str) -> None:
        """Measure a block's errors, into the store."""
        self.chains[graph].errors(self.chains[graph].block(block))

    def errors(self) -> list[list[float | None]]:
        """Of every item, by candidate; measured now if need be."""
        found: list[list[float | None]] = []
        for chain in self.chains:
            own: Errors = {}
            for block in chain.measured:
                for item, errors in chain.errors(block).items():
                    _add(own, item, errors)
            found += [own[i] for i in range(len(chain.choice.items))]
        return found


class _Calibration:
    """What candidates go by that need to know of activations; measured when it is asked for."""

    def __init__(self, builder: Builder, planned: Plan, asked: Calibration | None, stored: Sequence[Weight]) -> None:
        self._builder, self._planned, self.asked, self._stored = builder, planned, asked, stored

    @functools.cached_property
    def found(self) -> ComponentCalibration | None:
        """None if no candidate needs it."""
        if self.asked is None:
            return None
        name, store, digests = self._builder.plan.name, self._builder.store, self._builder.digests
        return calibrate(self._planned, name, store, digests, asked=self.asked, weights=self._stored)


class Chain:
    """A graph's blocks in a row, forward and back."""

    def __init__(
        self,
        builder: Builder,
        planned: Plan,
        number: int,
        tables: Values,
        choice: ChoiceGraph,
        calibration: _Calibration,
    ) -> None:
        graph = builder.plan.graphs[number]
        names = set(graph.blocks())
        self.choice, self._calibration = choice, calibration
        self.builder, self._tables = builder, tables
        self._blocks = [pair.plain for pair in builder.plan.pairs if pair.name in names]
        self._by_name = {b.name: b for b in self._blocks}
        self._item_of = {item.source: i for i, item in enumerate(choice.items)}
        gate = planned.recipe.gate
        functions = tuple(graph.functions)
        inputs = inputs_each(len(functions), gate.inputs)
        self._runs = every_run(functions, inputs)
        self._inputs = sample_inputs(graph, planned.resolved.family, gate.seed)
        self._seed = gate.seed
        self._references = References(self._blocks, self._runs, self._inputs, tables, builder.weights)
        self._done: set[str] = set()
        self._key_parts = {
            "blocks": [[b.name, b.structure(), builder.weights_digest(b)] for b in self._blocks],
            "tables": table_digests({k: v for k, v in tables.items() if f"tables.{k}" in self._sources()}),
            "runs": [self._runs, gate.seed],
            "tools": package_versions("torch"),
            "code": code_digest("toolchain.build.sweep", *code_modules(builder.plan.resolved)),
        }

    @functools.cached_property
    def measured(self) -> tuple[Block, ...]:
        """The blocks that have a weight to choose for, in order."""
        return tuple(b for b in self._blocks if self._own_items(b))

    def block(self, name: str) -> Block:
        """One of the blocks."""
        return self._by_name[name]

    def _sources(self) -> set[str]:
        return {s for b in self._blocks for s in b.sources.values()}

    def _own_items(self, block: Block) -> dict[str, int]:
        return {n: self._item_of[w.source] for n, w in block.weights.items() if w.source in self._item_of}

    # --- entries -----------------------------------------------------------------------------------------

    def _key(self, what: str, block: Block, **more: Any) -> str:
        return key_of({**self._key_parts, "what": what, "block": block.name, **more})

    def _forward(self, block: Block) -> Entry:
        """What the block and all before it gave, on every run."""
        found: Entry | None = None
        for each in self._blocks:
            if each.name not in self._done or each is block:
                key = self._key("forward", each)
                found = self.builder.store.get_or_make(KIND, key, functools.partial(self._run_forward, each))
                self._done.add(each.name)
            if each is block:
                break
        assert found is not None
        return found

    def _run_forward(self, block: Block, folder: Path) -> NewEntry:
        cases = self._references.cases(block.name)
        _save(folder, [case.outputs for case in cases])
        release()
        return NewEntry()

    def _backward(self, block: Block) -> Entry:
        """Gradients by the block's inputs, for every run."""
        key = self._key("backward", block)
        return self.builder.store.get_or_make(KIND, key, functools.partial(self._run_backward, block))

    def _run_backward(self, block: Block, folder: Path) -> NewEntry:
        given: list[Values] = []
        weights = dict(self.builder.weights(block))
        for (function, _), inputs, cotangents in zip(
            self._runs, self._block_inputs(block), self._cotangents(block), strict=True
        ):
            given.append(Backward(block, function, weights, inputs, ()).inputs(cotangents))
        _save(folder, given)
        release()
        return NewEntry()

    def errors_key(self, block: Block) -> str:
        """What the store knows a block's errors by."""
        stored = [
            {n: w.storage.name for n, w in weights.items() if w.source.tensors in self._tensors(block)}
            for weights in self.choice.stored
        ]
        sizes = [self.choice.items[i].sizes for i in sorted(set(self._own_items(block).values()))]
        asked = None if self._calibration.asked is None else self._calibration.asked.model_dump()
        return self._key("errors", block, stored=stored, sizes=sizes, calibration=asked)

    def _tensors(self, block: Block) -> set[tuple[str, ...]]:
        return {w.source.tensors for w in block.weights.values()}

    def prepare(self, block: Block) -> None:
        """Run what comes before a block, and back from the end what comes after it; calibrate, if need be."""
        _ = self._calibration.found
        self._forward(block)
        for later in reversed(self._blocks[self._blocks.index(block) + 1 :]):
            self._backward(later)

    def errors(self, block: Block) -> Errors:
        """The errors of a block's items; measured now if need be."""
        key = self.errors_key(block)
        entry = self.builder.store.get_or_make(KIND, key, lambda _: NewEntry({"errors": self._measure(block)}))
        order = sorted(set(self._own_items(block).values()))
        return dict(zip(order, entry.meta["errors"], strict=True))

    def _measure(self, block: Block) -> list[list[float | None]]:
        own = self._own_items(block)
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name in own}
        weights = dict(self.builder.weights(block))
        for (function, _), inputs, cotangents in zip(
            self._runs, self._block_inputs(block), self._cotangents(block), strict=True
        ):
            found = Backward(block, function, weights, inputs, own).parameters(cotangents)
            for name in own:
                gradients[name].append(found.get(name, torch.zeros(())).expand(block.weights[name].shape))
        totals: Errors = {}
        for name, item in own.items():
            _add(totals, item, squared_errors(gradients.pop(name), weights[name], self._decoded(block, name, item)))
        release()
        return [totals[i] for i in sorted(totals)]

    def _decoded(self, block: Block, name: str, item: int) -> list[Any]:
        """The weight as each candidate decodes it, when it is asked for; None where the target cannot keep it so."""
        read = reader(self.builder.plan.resolved.checkpoint, self.builder.plan.definition.aliases)
        source = block.weights[name].source
        tensors = set(source.tensors)

        def decode(stored: Mapping[str, Any]) -> torch.Tensor:
            own = {n: w for n, w in stored.items() if tensors & set(w.source.tensors)}
            return source.value(decoding_reader(own, read, self._calibration.found)).float()

        return [
            None if size is None else functools.partial(decode, stored)
            for size, stored in zip(self.choice.items[item].sizes, self.choice.stored, strict=True)
        ]

    # --- values ------------------------------------------------------------------------------------------

    def _block_inputs(self, block: Block) -> Iterator[Values]:
        """A block's inputs by port, run after run."""
        before = {s.split(".")[0] for s in block.sources.values()} & self._by_name.keys()
        loaded = {name: _load(self._forward(self._by_name[name])) for name in sorted(before)}
        for run, (function, number) in enumerate(self._runs):
            values = {f"inputs.{n}": v for n, v in self._inputs(function, number).items()}
            values |= {f"tables.{n}": v for n, v in self._tables.items()}
            values |= {f"{name}.{port}": v for name, runs in loaded.items() for port, v in runs[run].items()}
            yield {port: values[source] for port, source in block.sources.items()}

    def _cotangents(self, block: Block) -> Iterator[Values]:
        """Gradients by a block's outputs, for every run: of the results that it gives, and through the blocks after."""
        after = [b for b in self._blocks if any(s.split(".")[0] == block.name for s in b.sources.values())]
        loaded = [(b, _load(self._backward(b))) for b in after]
        results = _load(self._forward(block)) if block.results else None
        for run in range(len(self._runs)):
            found: Values = {}
            if results is not None:
                found = random_direction({p: results[run][p] for p in block.results}, self._seed * 1000 + run)
            for consumer, gradients in loaded:
                for port, gradient in gradients[run].items():
                    producer, _, output = consumer.sources[port].partition(".")
                    if producer == block.name:
                        before = found.get(output)
                        found[output] = gradient if before is None else before + gradient
            yield found


def _add(totals: Errors, item: int, errors: Sequence[float | None]) -> None:
    """Add an item's errors to those it has; what cannot be measured in one place cannot be in all."""
    before = totals.get(item, [0.0] * len(errors))
    totals[item] = [None if e is None or b is None else e + b for e, b in zip(errors, before, strict=True)]


def _save(folder: Path, values: Sequence[Values]) -> None:
    """Tensors by name of several runs."""
    data = {f"{i}.{name}": v.detach().contiguous().clone() for i, run in enumerate(values) for name, v in run.items()}
    save_file({**data, "runs": torch.tensor(len(values))}, folder / FILE)


def _load(entry: Entry) -> list[Values]:
    data = load_file(entry.data / FILE)
    found: list[Values] = [{} for _ in range(int(data.pop("runs")))]
    for name, value in data.items():
        run, _, port = name.partition(".")
        found[int(run)][port] = value
    return found
