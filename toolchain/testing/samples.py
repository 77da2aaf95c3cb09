"""A small component to try passes and targets on, its weights and its inputs; no model and no checkpoint is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from toolchain.ir.blocks import Block, BlockPair, extract_blocks
from toolchain.ir.feeds import Given, Latents, TextEmbedding, Timestep, TokenMask
from toolchain.ir.graph import Graph, Input, LoweredForm, capture, wire
from toolchain.ir.graph_text import definition_text
from toolchain.ir.legalise import legalise
from toolchain.ir.passes import find_pass
from toolchain.ir.target import Target
from toolchain.ir.weights import Weight, WeightSource
from toolchain.testing import sample_leaves as leaves

__all__ = ["Checkpoint", "port_values", "sample_graph", "sample_pairs"]

CHANNELS, WIDTH, HEADS, PATCH, TEXT = 2, 8, 2, 2, 5


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_attn, self.norm_cross_attn, self.norm_mlp = (leaves.SampleNorm() for _ in range(3))
        self.attn = leaves.SampleSelfAttention(WIDTH, HEADS)
        self.cross_attn = leaves.SampleCrossAttention(WIDTH, HEADS)
        self.mlp = leaves.SampleMlp(WIDTH)


class _Sample(LoweredForm):
    component = "sample"

    def __init__(self, frames: int, height: int, width: int, layers: int) -> None:
        super().__init__()
        self._size = (frames, height, width)
        self.conv = leaves.SampleConv3d(CHANNELS)
        self.patches = leaves.SamplePatchEmbed(CHANNELS, WIDTH, PATCH)
        self.positions, self.start = leaves.SamplePositions(WIDTH), leaves.SampleStart()
        self.level = leaves.SampleLevel(WIDTH)
        self.layers = nn.ModuleList(_Layer() for _ in range(layers))
        self.norm, self.end = leaves.SampleNorm(), leaves.SampleEnd(WIDTH, CHANNELS * PATCH**2)
        self.no_text = nn.Parameter(torch.zeros(TEXT, WIDTH))

    def inputs(self) -> tuple[Input, ...]:
        return (
            Input("latents", (2, CHANNELS, *self._size), Latents()),
            Input("text", (2, TEXT, WIDTH), TextEmbedding(unconditional="no_text"), rate="prompt"),
            Input("mask", (2, TEXT), TokenMask(), rate="prompt"),
            Input("timestep", (2,), Timestep(), exact=True),
        )

    def gives(self) -> dict[str, Given]:
        return {"out": "prediction"}

    def dims(self) -> dict[str, int]:
        frames, height, width = self._size
        tokens = (height // PATCH) * (width // PATCH)
        return {"B": 2, "T": frames, "S": tokens, "N": frames * tokens}

    def unit(self, path: str) -> tuple[str, ...]:
        parts = path.split(".")
        if parts[0] == "layers":
            return f"layer.{parts[1]}", "attention" if "attn" in parts[-1] else "mlp"
        return ("final",) if parts[0] in ("norm", "end") else ("embed",)

    def forward(
        self, latents: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        sizes = self.dims()
        level = wire(self.level(timestep), "level")
        positions = wire(self.positions(tokens=sizes["N"]), "positions")
        x = wire(self.start(self.patches(self.conv(latents)), positions), "x")
        for layer in self.layers:  # here, not in the layer: sums then belong to the parts that they are of
            assert isinstance(layer, _Layer)
            x = x + layer.attn(layer.norm_attn(x) + level, frames=sizes["T"])
            x = x + layer.cross_attn(layer.norm_cross_attn(x), text, mask)
            x = wire(x + layer.mlp(layer.norm_mlp(x)), "x")
        return wire(self.end(self.norm(x)), "out"), wire(self.no_text, "no_text")


def sample_graph(*, frames: int = 3, height: int = 4, width: int = 6, layers: int = 2, merged: bool = False) -> Graph:
    """A component with a leaf of every contract: a convolution, patches, and layers of two attentions and an MLP.

    Args:
        frames, height, width: of its latents; height and width are even.
        merged: with the function that ``token-merge`` adds.
    """
    with torch.device("meta"):
        graph = capture(_Sample(frames, height, width, layers))
    return find_pass("token-merge", {}, "sample")(graph) if merged else graph


def sample_pairs(target: Target, graph: Graph | None = None) -> tuple[BlockPair, ...]:
    """Blocks in ``target``'s legal forms, each with its plain one: those of a graph, by default the sample's.

    Of blocks that differ in their weights alone there is one.

    Raises:
        LoweringError: the target's forms have no answer for a leaf.
        AssertionError: a form edits the leaf that it is given.
    """
    graph = (sample_graph(merged=True) if graph is None else graph).stored_as(target.storage)
    cut, before = find_pass("partition", {}, "sample"), definition_text(graph)
    legal = legalise(graph, target.forms)
    if definition_text(graph) != before:
        raise AssertionError(f"target '{target.name}': a legal form edits the leaf that it is given; use Leaf.changed")
    lowered, plain = extract_blocks(cut(legal)), extract_blocks(cut(graph))
    pairs = {low.structure(): BlockPair(low, own) for low, own in reversed(list(zip(lowered, plain, strict=True)))}
    return tuple(reversed(pairs.values()))


class Checkpoint:
    """Random tensors of a checkpoint, as weights that nothing has changed yet ask for them.

    Args:
        weights: of a captured graph, or of a plain block.
    """

    def __init__(self, weights: Mapping[str, Weight], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tensors: dict[str, torch.Tensor] = {}
        self._derived: dict[WeightSource, torch.Tensor] = {}
        for name, weight in sorted(weights.items()):
            source = weight.source
            value = torch.randn(source.shape, generator=generator)
            if len(source.shape) > 1:
                value /= math.sqrt(max(1, math.prod(source.shape[1:])))
            elif "norm" not in name:
                value *= 0.3
            if len(source.tensors) == 1 and not source.is_part:
                value = self._tensors.setdefault(source.tensors[0], value).reshape(source.shape)
            self._derived.setdefault(source, value)

    def values(self, weights: Mapping[str, Weight], *, as_stored: bool = False) -> dict[str, torch.Tensor]:
        """The weights by name, float32; ``as_stored``: as they are after being kept in their storage.

        Raises:
            AssertionError: a weight comes from a tensor that the checkpoint does not have.
        """
        found = {name: self._value(name, weight.source) for name, weight in weights.items()}
        if as_stored:
            found = {n: weights[n].storage.decode(weights[n].storage.encode(v)) for n, v in found.items()}
        return found

    def _value(self, name: str, source: WeightSource) -> torch.Tensor:
        if source in self._derived:
            return self._derived[source]
        if missing := [t for t in source.tensors if t not in self._tensors]:
            raise AssertionError(f"weight '{name}' comes from '{missing[0]}', which no weight came from before")
        return source.value(self._tensors.__getitem__).contiguous()


def port_values(block: Block, function: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values for a function's inputs, by port: timesteps for exact ones, zeros and ones for integers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for port in block.signatures[function].inputs:
        if not port.dtype.is_floating_point:
            found[port.name] = torch.randint(0, 2, port.shape, generator=generator, dtype=port.dtype)
        elif port.exact:
            found[port.name] = torch.rand(port.shape, generator=generator) * 1000
        else:
            found[port.name] = torch.randn(port.shape, generator=generator)
    return found
