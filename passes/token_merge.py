"""Temporal dimension token merging (TDTM): attention on half of the frames.

Before self-attention and before cross-attention, neighbouring frames are averaged (T → ⌈T/2⌉); each
result is given to both frames. Gates, residuals and MLPs stay at all frames. Source: On-device Sora
(arXiv 2502.04363), section on Temporal Dimension Token Merging, as its code does it: self-attention merges
the modulated stream, cross-attention the residual stream, rotary positions are 0 … ⌈T/2⌉-1.

Odd T is our extension (the published exporter fails on it): a last frame without a neighbour goes through
alone. So are the options ``unmerge: linear``, ``pairs: alternating`` and ``layers``, which cost less accuracy.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import fx

from toolchain.errors import LoweringError
from toolchain.ir.functions import conditional
from toolchain.ir.graph import Graph, compute_nodes, copy_module, leaf_function, leaf_of, propagate_shapes
from toolchain.ir.memory_cut import Unit, stem_of
from toolchain.ir.passes import Pass, PassConfig

FUNCTION = "merged"


def merged_count(frames: int, lead: int = 0) -> int:
    """How many frames are left of T = ``frames``: ⌈T/2⌉, or ⌈(T+1)/2⌉ with the first frame alone (``lead`` 1)."""
    return (frames + lead + 1) // 2


@leaf_function
def merge_frames(x: torch.Tensor, frames: int, lead: int = 0) -> torch.Tensor:
    """Average neighbouring frames: ``[B, T·S, C]`` to ``[B, ⌈T/2⌉·S, C]``, T = ``frames``.

    Pairs are (0, 1), (2, 3), …; with ``lead`` 1 the first frame is alone and they are (1, 2), (3, 4), …, see
    :func:`merged_count`. A frame that is alone is left as it is: the mean of a frame with itself is that frame.
    """
    b, n, c = x.shape
    tokens = n // frames
    parts = [x[:, :tokens]] if lead else []
    parts += [x, x[:, n - tokens :]] if (frames + lead) % 2 else [x]
    x = torch.cat(parts, dim=1) if len(parts) > 1 else x
    pairs = x.reshape(b * merged_count(frames, lead), 2 * tokens, c)
    merged = (pairs[:, :tokens] + pairs[:, tokens:]) * 0.5
    return merged.reshape(b, -1, c)


@leaf_function
def unmerge_frames(x: torch.Tensor, frames: int, lead: int = 0, linear: bool = False) -> torch.Tensor:
    """Give merged frames to their sources: ``[B, ⌈T/2⌉·S, C]`` to ``[B, T·S, C]``, T = ``frames``.

    Each frame gets its pair's result. With ``linear`` it gets what lies at its own place on the line between two
    results, a quarter of the pairs' distance from its pair's centre: 0.75 of its own pair's result and 0.25 of that of
    the neighbouring pair which it is next to. Where there is none, at the first and the last pair, and for a frame that
    is alone, it gets its own result.

    Args:
        lead: as :func:`merge_frames` was given.
    """
    b, n, c = x.shape
    count = merged_count(frames, lead)
    tokens, trail = n // count, (frames + lead) % 2
    first, second = _between(x, tokens, lead, trail) if linear and count > 1 else (x, x)
    ends = first.reshape(b * count, tokens, c), second.reshape(b * count, tokens, c)
    both = torch.cat(ends, dim=1).reshape(b, 2 * n, c)
    return both[:, lead * tokens : (lead + frames) * tokens] if lead or trail else both


def _between(x: torch.Tensor, tokens: int, lead: int, trail: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first and the second frames of pairs get of ``x`` ``[B, ⌈T/2⌉·S, C]``, two or more results.

    ``lead`` and ``trail`` are 1 where the first pair's second frame, or the last one's first, is alone.
    """
    n = x.shape[1]
    start, end = x[:, :tokens], x[:, n - tokens :]
    before = torch.cat((start, x[:, : n - 2 * tokens], end) if trail else (start, x[:, : n - tokens]), dim=1)
    after = torch.cat((start, x[:, 2 * tokens :], end) if lead else (x[:, tokens:], end), dim=1)
    own = x * 0.75
    return own + before * 0.25, own + after * 0.25


class LayerRange(BaseModel):
    """Layers in a row, counted from 0; for STDiT3 a layer is a pair of a spatial and a temporal one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    first: int = Field(default=0, ge=0, description="The first layer.")
    last: int | None = Field(default=None, ge=0, description="The last layer, itself included; the model's if absent.")

    @model_validator(mode="after")
    def _in_order(self) -> LayerRange:
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last: {self.last} is before first: {self.first}")
        return self

    def __contains__(self, layer: int | None) -> bool:
        return layer is not None and layer >= self.first and (self.last is None or layer <= self.last)


class TokenMergeConfig(PassConfig):
    where: tuple[Literal["self_attention", "cross_attention"], ...] = Field(
        default=("self_attention", "cross_attention"),
        min_length=1,
        description="Which attentions run on merged frames.",
    )
    unmerge: Literal["repeat", "linear"] | None = Field(
        default=None,
        description="What frames get back: repeat (their pair's result; if absent) or linear (between neighbours').",
    )
    pairs: Literal["fixed", "alternating"] | None = Field(
        default=None,
        description="fixed: frames (0, 1), (2, 3), … are merged (if absent); alternating: in every second layer "
        "(1, 2), (3, 4), …, the first one alone.",
    )
    layers: LayerRange | None = Field(
        default=None, description="Layers whose attentions are merged, as {first: 4, last: 23}; all if absent."
    )


@dataclasses.dataclass(frozen=True)
class _Site:
    """An attention that runs on merged frames; ``lead`` is 1 where the first frame is alone."""

    node: fx.Node
    lead: int


class TokenMerge(Pass):
    """Add the function ``merged``: ``base`` with merging around its attentions.

    A component must give the sizes T (frames) and S (tokens of a frame), and N = T·S if at all. An attention must
    take the stream first and give it back as ``[B, T·S, C]``, all tokens of a frame before those of the next; the
    number of frames, where it must know, is its keyword ``frames``.

    Layers, for the options that go by them, are the units of the partition that have a number (``pair.3``), counted
    from 0 in the order in which they run. All attentions of a layer have the same pairs of frames: with ``alternating``
    those of layers 1, 3, 5, … have the first frame alone. What is in no layer has pairs as in layer 0, and is merged
    unless ``layers`` is given.
    """

    name = "token-merge"
    Config = TokenMergeConfig
    provides = (FUNCTION,)
    config: TokenMergeConfig

    def requires(self, graph: Graph) -> None:
        if FUNCTION in graph.functions:
            raise LoweringError(f"the graph has a function '{FUNCTION}' already; list the pass once")
        if (taken := conditional("base")) in graph.functions:
            raise LoweringError(
                f"it has '{taken}' already, and would have no '{conditional(FUNCTION)}'; list it before"
            )
        if "T" not in graph.dims:
            raise LoweringError("the component has no frames to merge")
        base, kinds = graph.functions["base"], " or ".join(self.config.where)
        if not any(self._is_merged(base, node) for node in base.graph.nodes):
            raise LoweringError(f"the graph has no {kinds}")
        if self.config.layers is not None:
            _check_range(self.config.layers, len(set(_layers(base).values())))
        sites = self._sites(base)
        if not sites:
            raise LoweringError(f"layers: there is no {kinds} in them")
        _check_sizes(graph.dims)
        for site in sites:
            _check_layout(graph, site.node)

    def idle(self, graph: Graph) -> Mapping[str, str]:
        if self.config.pairs != "alternating" or any(site.lead for site in self._sites(graph.functions["base"])):
            return {}
        return {"pairs": "pairs: alternating: no second layer is merged, so they are as with 'fixed'; leave it out"}

    def call(self, graph: Graph) -> Graph:
        frames = graph.dims["T"]
        gm = copy_module(graph.functions["base"])
        for site in self._sites(gm):
            node, stream = site.node, _stream(site.node)
            options: dict[str, Any] = {"frames": frames} | ({"lead": site.lead} if site.lead else {})
            with gm.graph.inserting_before(node):
                merged = gm.graph.call_function(merge_frames, (stream,), options)
            node.replace_input_with(stream, merged)
            if "frames" in node.kwargs:
                node.kwargs = {**node.kwargs, "frames": merged_count(frames, site.lead)}
            options |= {"linear": True} if self.config.unmerge == "linear" else {}
            with gm.graph.inserting_after(node):
                unmerged = gm.graph.call_function(unmerge_frames, (node,), options)
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

    def _is_merged(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        """Whether the node is an attention that the option ``where`` names."""
        leaf = leaf_of(gm, node)
        return leaf is not None and leaf.kind in self.config.where

    def _sites(self, gm: fx.GraphModule) -> list[_Site]:
        layers, asked, found = _layers(gm), self.config.layers, []
        for node in (n for n in gm.graph.nodes if self._is_merged(gm, n)):
            layer = layers.get(node.meta["unit"])
            if asked is None or layer in asked:
                found.append(_Site(node, (layer or 0) % 2 if self.config.pairs == "alternating" else 0))
        return found


def _layers(gm: fx.GraphModule) -> dict[Unit, int]:
    """Units that belong to layers, each with the number of its layer."""
    units = dict.fromkeys(n.meta["unit"] for n in compute_nodes(gm) if stem_of(n.meta["unit"]) is not None)
    numbers: dict[str, int] = {}
    return {unit: numbers.setdefault(unit[0], len(numbers)) for unit in units}


def _check_range(asked: LayerRange, count: int) -> None:
    largest = max(asked.first, asked.last or 0)
    if largest >= count:
        have = f"they are 0 to {count - 1}" if count else "the component has none"
        raise LoweringError(f"layers: there is no layer {largest}; {have}")


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
