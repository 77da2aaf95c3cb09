"""Eager float32 runs of a component's blocks: realistic inputs for every block, and what it should give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
Run = tuple[str, int]
"""A function of a component, and the number of the inputs that it is run on."""


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


def every_run(functions: Iterable[str], inputs: int) -> list[Run]:
    """Every function on each of so many inputs."""
    return [(function, number) for function in functions for number in range(inputs)]


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

    Each run goes through the blocks by itself. A block may be left out of it (:meth:`only`); the first block of its
    structure then stands in for it, since blocks of one structure take and give values of the same kind. Holds
    activations only, and only until their last use; runs nothing before it is asked for, and each block once.

    Args:
        blocks: the graph's blocks, not legalised, in order.
        runs: all that there are.
        inputs: the component's inputs for a function and the number of a run.
        tables: values known at build time.
        weights: reads a block's weights.
        first: block → the first one of its structure; each is its own where it is None.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        runs: Sequence[Run],
        inputs: Callable[[str, int], Values],
        tables: Mapping[str, torch.Tensor],
        weights: Callable[[Block], Weights],
        first: Mapping[str, str] | None = None,
    ) -> None:
        self._blocks, self._weights, self._first = blocks, weights, first or {}
        self._order = {b.name: i for i, b in enumerate(blocks)}
        self._runs: dict[str, Sequence[Run]] = {b.name: runs for b in blocks}
        self._done = 0
        self._cases: tuple[Case, ...] = ()
        self._values: dict[Run, Values] = {}
        self._start: Callable[[], dict[Run, Values]] = lambda: {
            (f, k): {f"inputs.{n}": v for n, v in inputs(f, k).items()} | {f"tables.{n}": v for n, v in tables.items()}
            for f, k in runs
        }
        self._last_use = {
            source: i
            for i, b in enumerate(blocks)
            for own in b.sources.values()
            for source in (own, self._stood_in(own))
        }

    def only(self, name: str, runs: Sequence[Run]) -> None:
        """Leave a block out of all but some runs; to be said before it, or one after it, is asked for."""
        assert self._order[name] >= self._done
        self._runs[name] = runs

    def cases(self, name: str) -> tuple[Case, ...]:
        """All runs of a block, in the order in which they were given. To be asked for in the order of blocks.

        Raises:
            KeyError: there is no such block, or its turn is over.
        """
        if self._done > self._order[name] + 1:
            raise KeyError(name)
        if not self._values:
            self._values = self._start()
        while self._done <= self._order[name]:
            self._cases = self._run(self._blocks[self._done])
            self._done += 1
        return self._cases

    def _run(self, block: Block) -> tuple[Case, ...]:
        weights = dict(self._weights(block)) if self._runs[block.name] else {}
        cases = []
        for run in self._runs[block.name]:
            values = self._values[run]
            given = {port: own if own in values else self._stood_in(own) for port, own in block.sources.items()}
            case = run_eager(block, run[0], weights, {p.name: values[given[p.name]] for p in block.inputs})
            values |= {f"{block.name}.{k}": v for k, v in case.outputs.items()}
            for source in [s for s in values if self._last_use.get(s, len(self._blocks)) <= self._done]:
                del values[source]
            cases.append(case)
        return tuple(cases)

    def _stood_in(self, source: str) -> str:
        """Where a value is taken from in a run that the block which gives it is left out of."""
        block, _, port = source.partition(".")
        return f"{self._first.get(block, block)}.{port}"
