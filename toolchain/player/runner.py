"""Runs one component's blocks: loads them in order, wires them, frees what is not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle
from toolchain.formats.loading import loads_of
from toolchain.formats.manifest import BlockEntry
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.feeds import Given
from toolchain.ir.target import Engine, Target
from toolchain.player.feeding import Fed, feed_inputs
from toolchain.player.opening import open_engine
from toolchain.player.trace import Trace


class ComponentRunner:
    """The blocks of a component, run by rate.

    Values that a rate's blocks hand to another rate's (the prompt's embedding to every step) are kept
    until they are computed anew; all others are dropped after their last use.
    """

    def __init__(self, bundle: Bundle, name: str, target: Target, trace: Trace) -> None:
        self.entry = bundle.manifest.components[name]
        self._name, self._bundle, self._target, self._trace = name, bundle, target, trace
        self._blocks = {b.name: b for b in self.entry.blocks}
        self._rate_of = {f"{b.name}.{o.name}": b.rate for b in self.entry.blocks for o in b.outputs}
        self._results = {o.source for o in self.entry.outputs}
        plan = bundle.manifest.loading.plan
        runs = Counter(block for block, _ in bundle.manifest.calls())
        self._kept = {b.partition("/")[2] for b, n in loads_of(plan).items() if n == 1 < runs[b]}
        self._engines: dict[str, Engine] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._tables: dict[str, torch.Tensor] = {}
        if self.entry.tables_file is not None:
            self._tables = load_file(bundle.path / self.entry.tables_file.path)
            self._values |= {f"tables.{k}": v for k, v in self._tables.items()}

    def run(self, rate: str, given: Mapping[str, torch.Tensor], function: str) -> dict[Given, torch.Tensor]:
        """Run all blocks of a rate, if there are any; returns that rate's results by what they are.

        Args:
            given: values by kind of feed, for the inputs that change at this rate.
            function: what the blocks are asked for.

        Raises:
            BundleError: an input has nothing that feeds it.
        """
        fed = [Fed(i.name, self._shape(i.name, i.shape, function), i.feed) for i in self.entry.inputs if i.rate == rate]
        self._values |= {f"inputs.{k}": v for k, v in feed_inputs(fed, given, self._tables).items()}
        order = self.entry.load_order.get(rate, [])  # type: ignore[call-overload]
        elsewhere = {i.source for b in self.entry.blocks if b.rate != rate for i in b.inputs} | self._results
        passing = {s for s, own in self._rate_of.items() if own == rate} - elsewhere
        last_use = {i.source: n for n, name in enumerate(order) for i in self._blocks[name].inputs}
        for n, name in enumerate(order):
            self._run_block(self._blocks[name], function)
            for source in [s for s, at in last_use.items() if at == n and s in passing]:
                del self._values[source]
        return {o.gives: self._values[o.source].float() for o in self.entry.outputs if o.rate == rate}

    def result(self, results: Mapping[Given, torch.Tensor], gives: Given) -> torch.Tensor:
        """One of :meth:`run`'s results.

        Raises:
            BundleError: the component does not give it.
        """
        if gives not in results:
            raise BundleError(f"'{self._bundle.path}': {self._name} gives no {gives}; build the bundle again")
        return results[gives]

    def free(self) -> None:
        """Unload every block and drop every value."""
        self._engines.clear()
        self._values.clear()

    def _run_block(self, block: BlockEntry, function: str) -> None:
        own = self.entry.own_function(block, function)
        engine = self._engine(block)
        arguments = {i.name: self._values[i.source].to(DTYPES[i.dtype].torch) for i in block.inputs}
        with self._trace.span(f"{block.name}.{own}", "run", self._name):
            results = engine(own, arguments)
        self._values |= {f"{block.name}.{k}": v for k, v in results.items()}
        del engine  # or it would live on while the next block is loaded
        if block.name not in self._kept:
            self._engines.pop(block.name, None)

    def _shape(self, name: str, shape: list[int], function: str) -> tuple[int, ...]:
        """An input's shape with ``function``: that of the first block that takes it and has another there."""
        for block in self.entry.blocks:
            for port in block.inputs:
                if port.source == f"inputs.{name}":
                    return tuple(block.other_shapes.get(function, {}).get(port.name, port.shape))
        return tuple(shape)

    def _engine(self, block: BlockEntry) -> Engine:
        if block.name not in self._engines:
            with self._trace.span(block.name, "load", self._name):
                self._engines[block.name] = open_engine(self._bundle, self._name, block, self._target)
        return self._engines[block.name]
