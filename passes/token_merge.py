"""Temporal dimension token merging (TDTM): attention on half of the frames.

Before self-attention and before cross-attention, neighbouring frames are averaged (T → ⌈T/2⌉); each
result is given to both frames. Gates, residuals and MLPs stay at all frames. Source: On-device Sora
(arXiv 2502.04363), section on Temporal Dimension Token Merging, as its code does it: self-attention merges
the modulated stream, cross-attention the residual stream, rotary positions are 0 … ⌈T/2⌉-1.

Odd T is our extension (the published exporter fails on it): a last frame without a neighbour goes through
alone.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import fx

from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph, copy_module, leaf_function, leaf_of, propagate_shapes
from toolchain.ir.passes import Pass, PassConfig

FUNCTION = "merged"


@leaf_function
def merge_frames(x: torch.Tensor, frames: int) -> torch.Tensor:
    """Average neighbouring frames: ``[B, T·S, C]`` to ``[B, ⌈T/2⌉·S, C]``, T = ``frames``."""
    b, n, c = x.shape
    tokens = n // frames
    if frames % 2:  # the mean of a frame with itself is that frame
        x = torch.cat((x, x[:, n - tokens :]), dim=1)
    pairs = x.reshape(b * ((frames + 1) // 2), 2 * tokens, c)
    merged = (pairs[:, :tokens] + pairs[:, tokens:]) * 0.5
    return merged.reshape(b, -1, c)


@leaf_function
def unmerge_frames(x: torch.Tensor, frames: int) -> torch.Tensor:
    """Give each merged frame to both of its sources: ``[B, ⌈T/2⌉·S, C]`` to ``[B, T·S, C]``."""
    b, n, c = x.shape
    half = (frames + 1) // 2
    tokens = n // half
    one = x.reshape(b * half, tokens, c)
    both = torch.cat((one, one), dim=1).reshape(b, 2 * n, c)
    return both[:, : frames * tokens] if frames % 2 else both


class TokenMergeConfig(PassConfig):
    where: tuple[Literal["self_attention", "cross_attention"], ...] = Field(
        default=("self_attention", "cross_attention"),
        min_length=1,
        description="Which attentions run on merged frames.",
    )


class TokenMerge(Pass):
    """Add the function ``merged``: ``base`` with merging around its attentions.

    A component must give the sizes T (frames) and S (tokens of a frame), and N = T·S if at all. An attention must
    take the stream first and give it back as ``[B, T·S, C]``, all tokens of a frame before those of the next; the
    number of frames, where it must know, is its keyword ``frames``.
    """

    name = "token-merge"
    Config = TokenMergeConfig
    provides = (FUNCTION,)
    config: TokenMergeConfig

    def requires(self, graph: Graph) -> None:
        if FUNCTION in graph.functions:
            raise LoweringError(f"the graph has a function '{FUNCTION}' already; list the pass once")
        if "T" not in graph.dims:
            raise LoweringError("the component has no frames to merge")
        sites = self._sites(graph.functions["base"])
        if not sites:
            raise LoweringError(f"the graph has no {' or '.join(self.config.where)}")
        _check_sizes(graph.dims)
        for node in sites:
            _check_layout(graph, node)

    def call(self, graph: Graph) -> Graph:
        frames = graph.dims["T"]
        gm = copy_module(graph.functions["base"])
        for node in self._sites(gm):
            stream = _stream(node)
            with gm.graph.inserting_before(node):
                merged = gm.graph.call_function(merge_frames, (stream,), {"frames": frames})
            node.replace_input_with(stream, merged)
            if "frames" in node.kwargs:
                node.kwargs = {**node.kwargs, "frames": (frames + 1) // 2}
            with gm.graph.inserting_after(node):
                unmerged = gm.graph.call_function(unmerge_frames, (node,), {"frames": frames})
            for user in [u for u in node.users if u is not unmerged]:
                user.replace_input_with(node, unmerged)
            for new in (merged, unmerged):
                new.meta = {k: v for k, v in node.meta.items() if k not in ("wire", "val")}
            del node.meta["val"]
        gm.recompile()
        propagate_shapes(gm, graph.inputs)
        return dataclasses.replace(graph, functions={**graph.functions, FUNCTION: gm})

    def ensures(self, graph: Graph) -> None:
        gm = graph.functions[FUNCTION]
        merges = sum(n.target is merge_frames for n in gm.graph.nodes)
        if merges != len(self._sites(gm)):
            raise LoweringError(f"{merges} merges for {len(self._sites(gm))} attentions")
        gm.graph.lint()

    def _sites(self, gm: fx.GraphModule) -> list[fx.Node]:
        leaves = ((n, leaf_of(gm, n)) for n in gm.graph.nodes)
        return [n for n, leaf in leaves if leaf is not None and leaf.kind in self.config.where]


def _stream(node: fx.Node) -> fx.Node:
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise LoweringError(f"'{node.name}' does not take the stream as its first argument")
    return node.args[0]


def _check_sizes(dims: Mapping[str, int]) -> None:
    if "S" not in dims:
        raise LoweringError("the component gives T (frames), but not S (tokens of a frame)")
    if dims.get("N", dims["T"] * dims["S"]) != dims["T"] * dims["S"]:
        raise LoweringError(f"the component has N={dims['N']} tokens; needed are T·S = {dims['T']}·{dims['S']}")


def _check_layout(graph: Graph, node: fx.Node) -> None:
    """Refuse an attention whose stream is not ``[B, T·S, C]``, or that would not learn of the frames that are left."""
    frames, tokens = graph.dims["T"], graph.dims["S"]
    needed = f"needed is [B, T·S, C] with T·S = {frames}·{tokens}, frame after frame"
    for what, value in (("takes", _stream(node)), ("gives", node)):
        shape = list(value.meta["val"].shape)
        if len(shape) != 3 or shape[1] != frames * tokens:
            rest = f", which {frames} frames do not divide" if len(shape) == 3 and shape[1] % frames else ""
            raise LoweringError(f"'{node.name}' {what} {shape}{rest}; {needed}")
    leaf = leaf_of(graph.functions["base"], node)
    if leaf is None or "frames" not in inspect.signature(leaf.forward).parameters:
        return
    given = node.kwargs.get("frames", "nothing")
    if given != frames:
        raise LoweringError(f"'{node.name}' has {given} for the keyword 'frames'; needed is T = {frames}")
