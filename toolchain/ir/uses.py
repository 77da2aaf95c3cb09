"""What a graph's weights are used as: what quantization chooses by, and what targets can or cannot keep compressed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from toolchain.ir.contracts import EmbeddingLeaf
from toolchain.ir.graph import Graph, compute_nodes, leaf_of

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
    """What a weight of a graph is used as, and by which leaf."""

    use: Use
    kind: str
    """Of the leaf that has the weight."""
    address: str
    """``UNIT.KIND.NAME``: the unit of the partition, the kind of leaf, and the weight's name within the leaf."""
    delicate: bool
    """The model asks for it to be left as it is, or it is a vector, or small."""


def weight_uses(graph: Graph) -> dict[str, WeightUse]:
    """Every weight that belongs to a leaf, by its name in the graph."""
    found: dict[str, WeightUse] = {}
    for node in compute_nodes(graph.functions["base"]):
        leaf = leaf_of(graph.functions["base"], node)
        if leaf is None:
            continue
        owners = dict(leaf.named_modules())
        for name in graph.weights_at(str(node.target)):
            inner = name.removeprefix(f"{node.target}.")
            owner, _, last = inner.rpartition(".")
            shape = graph.weights[name].shape
            use = _use(owners[owner], last) if len(shape) > 1 else "other"
            delicate = leaf.delicate or use == "other" or math.prod(shape) < LEAST_NUMBERS
            address = ".".join((*node.meta["unit"], leaf.kind, inner))
            found[name] = WeightUse(use, leaf.kind, address, delicate)
    return found


def _use(owner: nn.Module, name: str) -> Use:
    if name != "weight":
        return "other"
    return next((use for kind, use in KINDS if isinstance(owner, kind)), "other")
