"""Runs one component's blocks: loads them in order, wires them, frees what is not kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import BlockEntry, TensorSpec
from toolchain.ir.blocks import Port
from toolchain.ir.target import Engine, Target
from toolchain.player.trace import Trace

DTYPES = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32}


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
        self._engines: dict[str, Engine] = {}
        self._values: dict[str, torch.Tensor] = {}
        self.tables: dict[str, torch.Tensor] = {}
        if self.entry.tables_file is not None:
            self.tables = load_file(bundle.path / self.entry.tables_file.path)
            self._values |= {f"tables.{k}": v for k, v in self.tables.items()}

    def run(self, rate: str, inputs: Mapping[str, torch.Tensor], function: str = "base") -> dict[str, torch.Tensor]:
        """Run all blocks of a rate; returns that rate's results by name."""
        order: list[str] = self.entry.load_order[rate]  # type: ignore[index]
        self._values |= {f"inputs.{k}": v for k, v in inputs.items()}
        elsewhere = {i.source for b in self.entry.blocks if b.rate != rate for i in b.inputs}
        passing = {s for s, own in self._rate_of.items() if own == rate} - elsewhere
        last_use = {i.source: n for n, name in enumerate(order) for i in self._blocks[name].inputs}
        for n, name in enumerate(order):
            block = self._blocks[name]
            own = function if function in block.functions else "base"
            engine = self._engine(block)
            arguments = {i.name: self._values[i.source].to(DTYPES[i.dtype]) for i in block.inputs}
            with self._trace.span(f"{name}.{own}", "run", self._name):
                results = engine(own, arguments)
            self._values |= {f"{name}.{k}": v for k, v in results.items()}
            del engine  # or it would live on while the next block is loaded
            if name not in self.entry.resident:
                self._engines.pop(name, None)
            for source in [s for s, at in last_use.items() if at == n and s in passing]:
                del self._values[source]
        outputs: list[str] = self.entry.outputs.get(rate, [])  # type: ignore[call-overload]
        return {name.partition(".")[2]: self._values.pop(name) for name in outputs}

    def free(self) -> None:
        """Unload every block and drop every value."""
        self._engines.clear()
        self._values.clear()

    def _engine(self, block: BlockEntry) -> Engine:
        if block.name not in self._engines:
            with self._trace.span(block.name, "load", self._name):
                inputs, outputs = (tuple(_port(s) for s in side) for side in (block.inputs, block.outputs))
                self._engines[block.name] = self._target.engine(self._bundle.path / block.artifact, inputs, outputs)
        return self._engines[block.name]


def _port(spec: TensorSpec) -> Port:
    return Port(spec.name, tuple(spec.shape), DTYPES[spec.dtype])
