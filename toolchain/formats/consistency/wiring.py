"""How values go from block to block: always onward, and in the shape and type that the taker takes."""

from __future__ import annotations

from toolchain.formats.consistency.shapes import asked_functions, input_of, rate_order, result, shape_in
from toolchain.formats.manifest import BlockEntry, Component, InputSpec, Manifest
from toolchain.ir.dtypes import DTYPES


def check_wiring(manifest: Manifest) -> None:
    """Hold every input of a block against what gives it: a block before it, a table, or an input of the component.

    Raises:
        ValueError: names the input.
    """
    for name, component in manifest.components.items():
        asked = asked_functions(manifest, name)
        for rate in asked:
            order = rate_order(component, rate)
            for block in (b for b in component.blocks if b.name in order):
                for port in block.inputs:
                    where = f"components.{name}.blocks.{block.name}.inputs.{port.name}"
                    _Wire(where, component, asked, block, port).check()


class _Wire:
    """An input of a block, and what it comes from."""

    def __init__(
        self, where: str, component: Component, asked: dict[str, list[str]], block: BlockEntry, port: InputSpec
    ) -> None:
        self.where, self.component, self.asked, self.block, self.port = where, component, asked, block, port
        self.rates = list(asked)

    def check(self) -> None:
        kind, _, name = self.port.source.partition(".")
        if kind == "inputs":
            self._check_input(name)
        elif kind == "tables":
            table = next(t for t in self.component.tables if t.name == name)
            for function in self.asked[self.block.rate]:
                self._fits(table.shape, table.dtype, function)
        else:
            self._check_block()

    def _check_input(self, name: str) -> None:
        given = input_of(self.component, name, self.block.rate)
        self._comes_before(given.rate)
        takers = [
            (b, p)
            for b in self.component.blocks
            for p in b.inputs
            if p.source == self.port.source and input_of(self.component, name, b.rate) is given
        ]
        for function in self.asked[self.block.rate]:
            # it is made in the shape that the first block which takes it has then
            fed = function if given.rate == self.block.rate else self.component.default_function
            self._fits(shape_in(self.component, *takers[0], fed), given.dtype, function)
        if self.port.shape != given.shape:
            raise ValueError(f"{self.where}: it takes {self.port.shape}, but the component's input is {given.shape}")

    def _check_block(self) -> None:
        giver, given = result(self.component, self.port.source)
        alike = giver.rate == self.block.rate
        if alike:
            order = rate_order(self.component, giver.rate)
            if order.index(giver.name) >= order.index(self.block.name):
                raise ValueError(f"{self.where}: '{giver.name}' does not run before '{self.block.name}'")
        else:
            self._comes_before(giver.rate)
        for function in self.asked[self.block.rate]:
            for then in [function] if alike else self.asked[giver.rate]:
                self._fits(shape_in(self.component, giver, given, then), given.dtype, function)

    def _comes_before(self, rate: str) -> None:
        if rate not in self.rates or self.rates.index(rate) > self.rates.index(self.block.rate):
            raise ValueError(f"{self.where}: what it takes comes at rate '{rate}', not before rate '{self.block.rate}'")

    def _fits(self, shape: list[int], dtype: str, function: str) -> None:
        taken = shape_in(self.component, self.block, self.port, function)
        alike = self.port.dtype == dtype or (DTYPES[self.port.dtype].is_float and DTYPES[dtype].is_float)
        if taken != shape or not alike:
            raise ValueError(
                f"{self.where}: '{function}' takes {self.port.dtype} {taken}, but '{self.port.source}' gives "
                f"{dtype} {shape}"
            )
