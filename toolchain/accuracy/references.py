"""Eager float32 runs of a component's blocks: realistic inputs for every block, and what it should give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toolchain.formats.schedule import NUM_TRAIN_TIMESTEPS
from toolchain.ir.blocks import Block
from toolchain.ir.graph import Graph
from toolchain.models.family import ModelFamily

Weights = Mapping[str, torch.Tensor]
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One eager run of one function of a block, in the model's own scale.

    ``ranges`` has the least and the largest number that each step of the block's graph gave.
    """

    function: str
    inputs: Values
    outputs: Values
    ranges: Mapping[str, tuple[float, float]]


class _Watched(fx.Interpreter):
    """Runs a block's graph and notes every step's range."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_module", "call_function") and isinstance(result, torch.Tensor) and result.is_floating_point():
            low, high = result.aminmax()
            self.ranges[n.name] = float(low), float(high)
        return result


def run_eager(block: Block, function: str, weights: Weights, inputs: Mapping[str, torch.Tensor]) -> Case:
    """A function of ``block`` in PyTorch; ``inputs`` by port."""
    module = block.module(block.own_function(function), weights)
    watched = _Watched(module)
    with torch.no_grad():
        results = watched.run(*(inputs[p.name] for p in block.inputs))
    for part in module.modules():  # it is in cycles, and would hold its weights until these are looked for
        part._parameters.clear()
        part._buffers.clear()
    outputs = dict(zip((p.name for p in block.outputs), results, strict=True))
    return Case(function, dict(inputs), outputs, watched.ranges)


def stored_case(block: Block, case: Case, weights: Weights) -> Case:
    """The same run on ``weights`` as an artifact keeps them: what it is held against."""
    return run_eager(block, case.function, weights, case.inputs)


def sample_inputs(
    graph: Graph, family: ModelFamily, seed: int, stretches: Mapping[str, tuple[float, float]] | None = None
) -> Callable[[str, int], Values]:
    """What a component's blocks are run on, for a function of its ``graph`` and the number of a run.

    Args:
        stretches: the least and the largest timestep that a function is run on, where it is not for all.
    """

    def inputs(function: str, run: int) -> Values:
        generator = torch.Generator().manual_seed(seed * 1000 + run)
        found = {}
        for spec in graph.inputs_of(function):
            value = family.sample_input(spec, generator)
            if stretches and spec.feed.kind == "timestep":
                least, largest = stretches[function]
                value = least + value * ((largest - least) / NUM_TRAIN_TIMESTEPS)
            found[spec.name] = value
        return found

    return inputs


class References:
    """A graph's blocks run eagerly one after the other, each on what those before it gave.

    Every function is run on several seeded inputs. Holds activations only, and only until their last use; runs
    nothing before it is asked for, and each block once.

    Args:
        blocks: the graph's blocks, not legalised, in order; with ``representatives`` those alone are run.
        functions: of the graph.
        inputs: the component's inputs for a function and the number of a run.
        runs: how many inputs a function is run on.
        tables: values known at build time.
        weights: reads a block's weights.
        representatives: block → the block that stands for it in the chain. Blocks of one structure take and give
            values of the same kind, so one may feed what another would.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        functions: Sequence[str],
        inputs: Callable[[str, int], Values],
        runs: int,
        tables: Mapping[str, torch.Tensor],
        weights: Callable[[Block], Weights],
        representatives: Mapping[str, str] | None = None,
    ) -> None:
        stand_in = representatives or {b.name: b.name for b in blocks}
        self._chain = [b for b in blocks if stand_in[b.name] == b.name]
        self._stand_in = stand_in
        self._weights = weights
        self._done = 0
        self._cases: dict[str, tuple[Case, ...]] = {}
        self._values: dict[tuple[str, int], Values] = {}
        self._start: Callable[[], dict[tuple[str, int], Values]] = lambda: {
            (f, k): {f"inputs.{n}": v for n, v in inputs(f, k).items()} | {f"tables.{n}": v for n, v in tables.items()}
            for f in functions
            for k in range(runs)
        }
        self._last_use = {self._source(s): i for i, b in enumerate(self._chain) for s in b.sources.values()}

    def cases(self, name: str) -> tuple[Case, ...]:
        """All runs of a block of the chain: every function on every input. To be asked for in order, once.

        Raises:
            KeyError: the block stands for nobody, or its turn is over.
        """
        order = {b.name: i for i, b in enumerate(self._chain)}
        if not self._values:
            self._values = self._start()
        while self._done <= order[name]:
            self._cases = {self._chain[self._done].name: self._run(self._chain[self._done])}
            self._done += 1
        return self._cases[name]

    def _run(self, block: Block) -> tuple[Case, ...]:
        weights = dict(self._weights(block))
        cases = []
        for (function, _), values in self._values.items():
            inputs = {p.name: values[self._source(block.sources[p.name])] for p in block.inputs}
            case = run_eager(block, function, weights, inputs)
            values |= {f"{block.name}.{k}": v for k, v in case.outputs.items()}
            for source in [s for s in values if self._last_use.get(s, len(self._chain)) <= self._done]:
                del values[source]
            cases.append(case)
        return tuple(cases)

    def _source(self, source: str) -> str:
        """Where a value comes from in the chain: a block that is not in it is stood in for."""
        block, _, port = source.partition(".")
        return f"{self._stand_in.get(block, block)}.{port}"
