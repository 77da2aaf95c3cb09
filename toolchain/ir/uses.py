"""What a graph's weights are used as: what quantization chooses by, and what targets can or cannot keep compressed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from toolchain.ir.contracts import EmbeddingLeaf
from toolchain.ir.graph import Graph, compute_nodes
from toolchain.ir.leaves import Leaf

Use = Literal["linear", "convolution", "embedding", "other"]
"""``other`` is everything that is no matrix of a linear layer or convolution and no table that is looked up."""

KINDS: tuple[tuple[type[nn.Module], Use], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "convolution"),
    (nn.Conv2d, "convolution"),
    (nn.Conv3d, "convolution"),
    (nn.Embedding, "embedding"),
    (EmbeddingLeaf, "embedding"),
)
LEAST_NUMBERS = 4096
"""Smaller weights are not worth the error: together they are a thousandth of a model."""


@dataclass(frozen=True)
class WeightUse:
    """What a weight of a graph is used as, and by what module."""

    use: Use
    address: str
    """``UNIT.KIND.NAME``: the unit of the partition, the kind of leaf, and the weight's name within the leaf.

    The kind of a module of torch's is its name in small letters: ``linear``."""
    delicate: bool
    """The model asks for it to be left as it is, or it is a vector, or small."""


def weight_uses(graph: Graph) -> dict[str, WeightUse]:
    """Every weight that belongs to a module which the graph calls, by its name in the graph."""
    found: dict[str, WeightUse] = {}
    base = graph.functions["base"]
    for node in compute_nodes(base):
        if node.op != "call_module":
            continue
        module = base.get_submodule(str(node.target))
        if isinstance(module, Leaf):
            kind, left_alone = module.kind, module.delicate
        else:
            kind, left_alone = type(module).__name__.lower(), False
        owners = dict(module.named_modules())
        for name in graph.weights_at(str(node.target)):
            inner = name.removeprefix(f"{node.target}.")
            owner, _, last = inner.rpartition(".")
            shape = graph.weights[name].shape
            use = _use(owners[owner], last) if len(shape) > 1 else "other"
            delicate = left_alone or use == "other" or math.prod(shape) < LEAST_NUMBERS
            address = ".".join((*node.meta["unit"], kind, inner))
            found[name] = WeightUse(use, address, delicate)
    return found


def _use(owner: nn.Module, name: str) -> Use:
    if name != "weight":
        return "other"
    return next((use for kind, use in KINDS if isinstance(owner, kind)), "other")
