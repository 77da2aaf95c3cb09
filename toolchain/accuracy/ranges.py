"""A whole denoiser that leaves out ranges of blocks, as a graph: what bundles that reuse are held against."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from toolchain.formats.reuse import computes
from toolchain.formats.schedule import Step
from toolchain.ir.blocks import value_of
from toolchain.ir.graph import Graph, copy_module, output_node
from toolchain.planning.ranges import Range
from toolchain.planning.sampling import Sampling
from toolchain.player.accumulated import AccumulatedState

Materialise = Callable[[fx.GraphModule], fx.GraphModule]
"""Gives a function its weights."""
Made = tuple[str, tuple[str, ...], str | None]
"""A function with the ranges that it computes, and the one that it reuses."""


class ReusingGraph:
    """A partitioned graph's functions, called as steps of a video ask for them.

    Keeps what ranges added; make a new one for every video.

    Args:
        made: where functions with their weights are kept, for other videos too.
    """

    def __init__(
        self, graph: Graph, sampling: Sampling, materialise: Materialise, made: dict[Made, fx.GraphModule]
    ) -> None:
        self._graph, self._ranges, self._rule, self._materialise = graph, sampling.ranges, sampling.rule, materialise
        self._state = None if sampling.rule is None else AccumulatedState(sampling.rule, len(sampling.steps))
        self._modules = made
        self._observing: dict[str, fx.GraphModule] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, step: Step, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The results of a step's function for its inputs."""
        if self._leaves_out(step, arguments):
            step = replace(step, reuse=next(iter(self._ranges)))
        blocks = {name: own.blocks for name, own in self._ranges.items()}
        computed = [name for name in self._ranges if computes(step, name, blocks)]
        key = step.function, tuple(computed), step.reuse
        if key not in self._modules:
            reused = None if step.reuse is None else self._ranges[step.reuse]
            gm = with_ranges(self._graph, step.function, [self._ranges[n] for n in computed], reused)
            self._modules[key] = self._materialise(gm)
        added = [] if step.reuse is None else [self._kept[step.reuse]]
        results: tuple[torch.Tensor, ...] = self._modules[key](*arguments, *added)
        count = len(self._graph.outputs)
        self._kept |= dict(zip(computed, results[count:], strict=True))
        return results[:count]

    def _leaves_out(self, step: Step, arguments: Sequence[torch.Tensor]) -> bool:
        """What the rule says, if there is one, which looks at what is computed before the range."""
        if self._rule is None or self._state is None:
            return False
        if step.function not in self._observing:
            gm = copy_module(self._graph.functions[step.function])
            node = value_of(self._graph, step.function, self._rule.observes)
            output_node(gm).args = ((next(n for n in gm.graph.nodes if n.name == node.name),),)
            gm.graph.eliminate_dead_code()
            gm.recompile()
            self._observing[step.function] = self._materialise(gm)
        return self._state.leaves_out(step.index, self._observing[step.function](*arguments)[0])


def with_ranges(graph: Graph, function: str, computed: Sequence[Range], reused: Range | None) -> fx.GraphModule:
    """A function that also returns what each of the ranges ``computed`` adds, after its own results.

    In place of the blocks of ``reused`` it adds what it takes as its last input: of more rows than needed, the
    first.

    Args:
        graph: partitioned, so that its nodes know their blocks.
    """
    gm = copy_module(graph.functions[function])
    twins = {n.name: n for n in gm.graph.nodes}
    values = {s: twins[value_of(graph, function, s).name] for r in computed for s in (r.input, r.output)}
    if reused is not None:
        goes_in, comes_out = (twins[value_of(graph, function, s).name] for s in (reused.input, reused.output))
        last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
        with gm.graph.inserting_after(last):
            added = gm.graph.placeholder("added")
        with gm.graph.inserting_before(comes_out):
            rows = gm.graph.call_function(operator.getitem, (added, slice(0, goes_in.meta["val"].shape[0])))
            stand_in = gm.graph.call_function(operator.add, (goes_in, rows))
        comes_out.replace_all_uses_with(stand_in)
        values[reused.output] = stand_in
    output = output_node(gm)
    with gm.graph.inserting_before(output):
        added_by = [gm.graph.call_function(operator.sub, (values[r.output], values[r.input])) for r in computed]
    output.args = ((*output.args[0], *added_by),)  # type: ignore[misc]
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm
