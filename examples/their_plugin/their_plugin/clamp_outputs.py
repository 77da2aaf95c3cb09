"""The pass ``clamp-outputs``: one outlier in a leaf's output becomes infinity in float16; cut it off before that."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import fx

from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph, leaf_function, leaf_of
from toolchain.ir.passes import Pass, PassConfig


@leaf_function
def keep_within(x: torch.Tensor, limit: float) -> torch.Tensor:
    """``x``, of any shape, with its numbers cut off at ±``limit``."""
    return x.clamp(-limit, limit)


class ClampOutputsConfig(PassConfig):
    kinds: tuple[str, ...] = Field(default=("mlp",), min_length=1, description="Kinds of leaves.")
    limit: float = Field(default=60000.0, gt=0, description="Largest number that they may give.")


class ClampOutputs(Pass):
    """Put ``keep_within`` after every leaf of some kinds, in all functions.

    A legal form may keep the residual stream scaled, down as a rule; the limit is for what then flows.
    """

    name = "clamp-outputs"
    Config = ClampOutputsConfig
    config: ClampOutputsConfig

    def requires(self, graph: Graph) -> None:
        if not self._chosen(graph.functions["base"]):
            raise LoweringError(f"the graph has no {' or '.join(self.config.kinds)}")

    def call(self, graph: Graph) -> Graph:
        graph = graph.copy()
        for gm in graph.functions.values():
            for node in self._chosen(gm):
                with gm.graph.inserting_after(node):
                    kept = gm.graph.call_function(keep_within, (node,), {"limit": self.config.limit})
                kept.meta = dict(node.meta)  # of the same shape, rate, unit and wire
                node.meta.pop("wire", None)
                for user in [u for u in node.users if u is not kept]:
                    user.replace_input_with(node, kept)
            gm.recompile()
        return graph

    def _chosen(self, gm: fx.GraphModule) -> list[fx.Node]:
        leaves = ((n, leaf_of(gm, n)) for n in gm.graph.nodes)
        return [n for n, leaf in leaves if leaf is not None and leaf.kind in self.config.kinds]
