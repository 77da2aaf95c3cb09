"""Classifier-free guidance, split: every function once more, for the conditional half of the batch alone.

With guidance (arXiv 2207.12598) a denoiser is called on a batch of two halves, the conditional one first. A step
that does without the unconditional half calls NAME_conditional instead of NAME: the same weights, half the batch,
and so half of the work.

What is computed once for a prompt is computed for both halves, whatever the steps call; the new functions take the
first half of it themselves. A player feeds them the same values, and of what changes from step to step, half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import fx

from toolchain.errors import LoweringError
from toolchain.ir.activations import rounded_layers
from toolchain.ir.feeds import TextEmbedding
from toolchain.ir.functions import conditional
from toolchain.ir.graph import (
    RATES,
    Graph,
    Input,
    compute_nodes,
    copy_module,
    leaf_function,
    output_values,
    propagate_shapes,
)
from toolchain.ir.passes import Pass

ONCE = RATES.index("prompt")
"""What changes as often as this or less is there for both halves."""


@leaf_function
def conditional_half(x: torch.Tensor) -> torch.Tensor:
    """The first half of a batch: ``[B, …]`` to ``[B/2, …]``."""
    return x[: x.shape[0] // 2]


class GuidanceSplit(Pass):
    """Add NAME_conditional for every function NAME.

    A component must give the size B, the batch of both halves. What changes from step to step has it first, in inputs
    and results, and leaves must take any batch.
    """

    name = "guidance-split"
    provides = (conditional("base"),)

    def adds_to(self, functions: Collection[str]) -> tuple[str, ...]:
        return tuple(map(conditional, functions))

    def requires(self, graph: Graph) -> None:
        if taken := set(self.adds_to(graph.functions)) & graph.functions.keys():
            raise LoweringError(f"the graph has a function '{min(taken)}' already; list the pass once")
        if graph.blocks():
            raise LoweringError(f"the graph is partitioned already; put '{self.name}' before 'partition'")
        if any(rounded_layers(gm) for gm in graph.functions.values()):
            raise LoweringError(f"layers round what comes in, with scales by function; put '{self.name}' before that")
        batch = graph.dims.get("B")
        if batch is None:
            raise LoweringError("the component gives no B (the batch of both halves of guidance)")
        if batch % 2:
            raise LoweringError(f"the component has a batch of B={batch}, which has no two halves")
        if not any(_is_halved(spec, batch) for spec in graph.inputs):
            raise LoweringError(f"no input that changes from step to step has the batch B={batch} first")
        for spec in graph.inputs:
            if isinstance(spec.feed, TextEmbedding) and not _once(spec.rate):
                raise LoweringError(f"the text embedding '{spec.name}' has the rate '{spec.rate}'; needed is 'prompt'")

    def call(self, graph: Graph) -> Graph:
        added = {conditional(name): _half(graph, gm) for name, gm in graph.functions.items()}
        return dataclasses.replace(graph, functions={**graph.functions, **added})

    def ensures(self, graph: Graph) -> None:
        batch = graph.dims["B"]
        for name, whole in graph.functions.items():
            half = graph.functions.get(conditional(name))
            if half is None:
                continue
            half.graph.lint()
            for output, a, b in zip(graph.outputs, output_values(whole), output_values(half), strict=True):
                both, one = a.meta["val"], b.meta["val"]
                if not _once(a.meta["rate"]) and not _has_batch(both, one, batch):
                    raise LoweringError(
                        f"'{conditional(name)}' gives {list(one.shape)} for '{output}', and '{name}' gives "
                        f"{list(both.shape)}; needed is half of the batch B={batch}, which is first"
                    )


def _once(rate: str) -> bool:
    return RATES.index(rate) <= ONCE


def _is_halved(spec: Input, batch: int) -> bool:
    return not _once(spec.rate) and spec.shape[:1] == (batch,)


def _halved(spec: Input) -> Input:
    return dataclasses.replace(spec, shape=(spec.shape[0] // 2, *spec.shape[1:]))


def _sized(gm: fx.GraphModule, inputs: tuple[Input, ...]) -> fx.GraphModule:
    """``gm``, which is edited, with the shapes that follow from ``inputs``."""
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    propagate_shapes(gm, inputs)
    return gm


def _half(graph: Graph, whole: fx.GraphModule) -> fx.GraphModule:
    """``whole`` for the first half of the batch."""
    batch = graph.dims["B"]
    inputs = tuple(_halved(spec) if _is_halved(spec, batch) else spec for spec in graph.inputs)
    batched = _batched(graph, whole)
    gm = copy_module(whole)
    halves: dict[tuple[fx.Node, object], fx.Node] = {}
    for node in list(compute_nodes(gm)):
        if _once(node.meta["rate"]):
            continue
        for value in [i for i in node.all_input_nodes if i.name in batched]:
            place = (value, node.meta["unit"])  # one for each unit, so that every block has its own
            if place not in halves:
                with gm.graph.inserting_before(node):
                    halves[place] = gm.graph.call_function(conditional_half, (value,))
                halves[place].meta = {"rate": value.meta["rate"], "unit": node.meta["unit"]}
            node.replace_input_with(value, halves[place])
    gm.recompile()
    return _sized(gm, inputs)


def _batched(graph: Graph, whole: fx.GraphModule) -> set[str]:
    """Names of the nodes that are known once a prompt, have the batch first, and are used at every step."""
    batch = graph.dims["B"]
    inputs = tuple(_halved(spec) if spec.shape[:1] == (batch,) else spec for spec in graph.inputs)
    gm = _sized(copy_module(whole), inputs)
    used = {i.name for n in compute_nodes(gm) if not _once(n.meta["rate"]) for i in n.all_input_nodes}
    found = set()
    for a, b in zip(whole.graph.nodes, gm.graph.nodes, strict=True):
        if a.name not in used or not _once(a.meta["rate"]) or _alike(a.meta["val"], b.meta["val"]):
            continue
        if not _has_batch(a.meta["val"], b.meta["val"], batch):
            raise LoweringError(f"'{a.name}' is known once a prompt, and does not have the batch B={batch} first")
        found.add(a.name)
    return found


def _alike(whole: object, half: object) -> bool:
    if isinstance(whole, torch.Tensor) and isinstance(half, torch.Tensor):
        return whole.shape == half.shape
    return isinstance(whole, (tuple, list)) and isinstance(half, (tuple, list)) and all(map(_alike, whole, half))


def _has_batch(whole: object, half: object, batch: int) -> bool:
    """Whether a value has the batch first, and half of it in the other case."""
    if not (isinstance(whole, torch.Tensor) and isinstance(half, torch.Tensor)) or not whole.dim():
        return False
    return whole.shape[0] == batch and tuple(half.shape) == (batch // 2, *whole.shape[1:])
