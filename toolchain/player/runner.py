"""Runs one component's blocks in order, and wires them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import BlockEntry
from toolchain.formats.tensors import read_tensors
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.feeds import Given
from toolchain.player.feeding import Fed, feed_inputs
from toolchain.player.residuals import NO_RANGES, Residuals, StepRanges

CallBlock = Callable[[str, str, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Runs a function of a block (``COMPONENT/BLOCK``) on values by port, and gives its outputs."""


class ComponentRunner:
    """The blocks of a component, run by rate.

    Values that a rate's blocks hand to another rate's (the prompt's embedding to every step) are kept
    until they are computed anew; all others are dropped after their last use.
    """

    def __init__(self, bundle: Bundle, name: str, call: CallBlock) -> None:
        self.entry = bundle.manifest.components[name]
        self._name, self._bundle, self._call = name, bundle, call
        self._blocks = {b.name: b for b in self.entry.blocks}
        self._rate_of = {f"{b.name}.{o.name}": b.rate for b in self.entry.blocks for o in b.outputs}
        self._results = {o.source for o in self.entry.outputs}
        self._dtypes = {f"{b.name}.{o.name}": DTYPES[o.dtype].torch for b in self.entry.blocks for o in b.outputs}
        self._residuals = Residuals()
        self._values: dict[str, torch.Tensor] = {}
        self._tables: dict[str, torch.Tensor] = {}
        if self.entry.tables_file is not None:
            self._tables = read_tensors(bundle.path / self.entry.tables_file.path)
            self._values |= {f"tables.{k}": v for k, v in self._tables.items()}

    def run(
        self, rate: str, given: Mapping[str, torch.Tensor], function: str, ranges: StepRanges = NO_RANGES
    ) -> dict[Given, torch.Tensor]:
        """Run all blocks of a rate, if there are any; returns that rate's results by what they are.

        Args:
            given: values by kind of feed, for the inputs that change at this rate.
            function: what the blocks are asked for.
            ranges: blocks that are left out, and those of which is kept what they add.

        Raises:
            BundleError: an input has nothing that feeds it.
        """
        fed = [Fed(i.name, self._shape(i.name, i.shape, function), i.feed) for i in self.entry.inputs if i.rate == rate]
        self._values |= {f"inputs.{k}": v for k, v in feed_inputs(fed, given, self._tables).items()}
        order = self.entry.load_order.get(rate, [])  # type: ignore[call-overload]
        elsewhere = {i.source for b in self.entry.blocks if b.rate != rate for i in b.inputs} | self._results
        passing = {s for s, own in self._rate_of.items() if own == rate} - elsewhere
        last_use = {i.source: n for n, name in enumerate(order) for i in self._blocks[name].inputs}
        for own in ranges.computed:  # what went in is needed until the residual is made
            last_use[own.input] = max(last_use[own.input], order.index(own.blocks[-1]))
        reused = ranges.reused
        if reused is not None and ranges.observed is not None:
            last_use[ranges.observed] = max(last_use[ranges.observed], order.index(reused.blocks[0]))
        for n, name in enumerate(order):
            if reused is not None and name == reused.blocks[0]:
                if ranges.leaves_out is not None and not ranges.leaves_out(self._values[str(ranges.observed)]):
                    reused = None
                else:
                    self._values[reused.output] = self._residuals.applied(reused, self._values[reused.input])
            if reused is None or name not in reused.blocks:
                self._run_block(self._blocks[name], function)
            for own in ranges.computed:
                if name == own.blocks[-1] and own is not reused:
                    self._residuals.keep(own, self._values, self._dtypes[own.output])
            for source in [s for s, at in last_use.items() if at == n and s in passing]:
                self._values.pop(source, None)  # what a block that was left out gives is not there
        for own in ranges.dropped:
            self._residuals.drop(own)
        return {o.gives: self._values[o.source].float() for o in self.entry.outputs if o.rate == rate}

    def result(self, results: Mapping[Given, torch.Tensor], gives: Given) -> torch.Tensor:
        """One of :meth:`run`'s results.

        Raises:
            BundleError: the component does not give it.
        """
        if gives not in results:
            raise BundleError(f"'{self._bundle.path}': {self._name} gives no {gives}; build the bundle again")
        return results[gives]

    def _run_block(self, block: BlockEntry, function: str) -> None:
        arguments = {i.name: self._values[i.source].to(DTYPES[i.dtype].torch) for i in block.inputs}
        results = self._call(f"{self._name}/{block.name}", self.entry.own_function(block, function), arguments)
        self._values |= {f"{block.name}.{k}": v for k, v in results.items()}

    def _shape(self, name: str, shape: list[int], function: str) -> tuple[int, ...]:
        """An input's shape with ``function``: that of the first block that takes it and has another there."""
        for block in self.entry.blocks:
            for port in block.inputs:
                if port.source == f"inputs.{name}":
                    return tuple(block.other_shapes.get(function, {}).get(port.name, port.shape))
        return tuple(shape)
