"""What each block needs while it runs: weights, activations, what it takes and gives, what stays beside it; work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.ir.blocks import Block
from toolchain.ir.graph import RATES
from toolchain.ir.memory import Peak
from toolchain.ir.target import Target


@dataclass(frozen=True)
class Work:
    """What a function computes and moves: operations, and bytes read from and written to memory."""

    flops: int
    moved_bytes: int


@dataclass(frozen=True)
class BlockMemory:
    """``peaks`` are by function, and have the block's inputs and outputs in them; ``waiting`` is what stays meanwhile.

    That are values of others which are needed after the block has run, and which it neither takes nor gives. ``left``
    is what stays when it has run, its own results among it. ``works`` are by function.
    """

    weights: int
    peaks: Mapping[str, Peak]
    waiting: int
    left: int
    works: Mapping[str, Work]

    @property
    def function(self) -> str:
        """The function with the largest peak."""
        return max(self.peaks, key=lambda f: self.peaks[f].bytes)

    @property
    def activations(self) -> int:
        """Bytes beside weights while the block runs: its largest peak, and what waits."""
        return self.peaks[self.function].bytes + self.waiting

    @property
    def total(self) -> int:
        return self.weights + self.activations


def block_memory(blocks: Sequence[Block], target: Target) -> dict[str, BlockMemory]:
    """By the blocks' names; each structure is looked at once."""
    known: dict[str, tuple[dict[str, Peak], dict[str, Work]]] = {}
    lives = _Lives(blocks, target)
    found = {}
    for i, block in enumerate(blocks):
        structure = block.structure()
        if structure not in known:
            graphs = {f: target.operators(block, f) for f in block.functions}
            known[structure] = (
                {f: target.peak(block, graph) for f, graph in graphs.items()},
                {f: Work(graph.flops, target.moved_bytes(block, graph)) for f, graph in graphs.items()},
            )
        peaks, works = known[structure]
        found[block.name] = BlockMemory(block.weight_bytes, peaks, lives.waiting(i), lives.left(i), works)
    return found


class _Lives:
    """From when until when values between blocks are there, by place among the blocks.

    A component's inputs, its tables and its results are there all along; what a block gives to one that runs more
    often stays until all of these have run, everything else until its last use.
    """

    def __init__(self, blocks: Sequence[Block], target: Target) -> None:
        self.blocks = blocks
        self.sizes: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.again: set[str] = set()
        """What all rounds of a loop need, and so still does after its last block."""
        loops = {block.rate: i for i, block in enumerate(blocks)}
        rate_of = {f"{b.name}.{p.name}": b.rate for b in blocks for p in b.outputs}
        for i, block in enumerate(blocks):
            for signature in block.signatures.values():
                for port in signature.inputs:
                    source = block.sources[port.name]
                    self.sizes[source] = max(self.sizes.get(source, 0), target.value_bytes(port))
                    outside = source not in rate_of
                    self.first.setdefault(source, 0)
                    slower = not outside and RATES.index(rate_of[source]) < RATES.index(block.rate)
                    if slower:
                        self.again.add(source)
                    until = len(blocks) if outside else loops[block.rate] if slower else i
                    self.last[source] = max(self.last.get(source, 0), until)
                for port in signature.outputs:
                    source = f"{block.name}.{port.name}"
                    self.sizes[source] = max(self.sizes.get(source, 0), target.value_bytes(port))
                    self.first[source] = i
                    kept = len(blocks) if port.name in block.results else i
                    self.last[source] = max(self.last.get(source, i), kept)

    def waiting(self, i: int) -> int:
        """Bytes that wait while block ``i`` runs, its own inputs and outputs left out."""
        block = self.blocks[i]
        own = {*block.sources.values(), *(f"{block.name}.{p.name}" for p in block.outputs)}
        return sum(n for s, n in self.sizes.items() if s not in own and self.first[s] <= i <= self.last[s])

    def left(self, i: int) -> int:
        """Bytes that are needed after block ``i`` has run."""
        return sum(
            n for s, n in self.sizes.items() if self.first[s] <= i < self.last[s] + (1 if s in self.again else 0)
        )
