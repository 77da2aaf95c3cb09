"""What each block needs while it runs: its weights, the peak of its activations, and what it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.ir.blocks import Block
from toolchain.ir.graph import RATES
from toolchain.ir.memory import Peak
from toolchain.ir.target import Target


@dataclass(frozen=True)
class BlockMemory:
    """``peaks`` are by function, and have the block's inputs and outputs in them; ``waiting`` is what stays meanwhile.

    That are values of others which are needed after the block has run, and which it neither takes nor gives.
    """

    weights: int
    peaks: Mapping[str, Peak]
    waiting: int

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
    known: dict[str, Mapping[str, Peak]] = {}
    waiting = _waiting(blocks, target)
    found = {}
    for block in blocks:
        structure = block.structure()
        if structure not in known:
            known[structure] = {f: target.peak(block, f) for f in block.functions}
        found[block.name] = BlockMemory(block.weight_bytes, known[structure], waiting[block.name])
    return found


def _waiting(blocks: Sequence[Block], target: Target) -> dict[str, int]:
    """Bytes of the values that wait while each block runs.

    A component's inputs, its tables and its results are there all along; what a block gives to one that runs more
    often waits until all of these have run, everything else until its last use.
    """
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    loops = {block.rate: i for i, block in enumerate(blocks)}
    rate_of = {f"{b.name}.{p.name}": b.rate for b in blocks for p in b.outputs}
    for i, block in enumerate(blocks):
        for signature in block.signatures.values():
            for port in signature.inputs:
                source = block.sources[port.name]
                sizes[source] = max(sizes.get(source, 0), target.value_bytes(port))
                outside = source not in rate_of
                first.setdefault(source, 0)
                slower = not outside and RATES.index(rate_of[source]) < RATES.index(block.rate)
                until = len(blocks) if outside else loops[block.rate] if slower else i
                last[source] = max(last.get(source, 0), until)
            for port in signature.outputs:
                source = f"{block.name}.{port.name}"
                sizes[source] = max(sizes.get(source, 0), target.value_bytes(port))
                first[source] = i
                last[source] = max(last.get(source, i), len(blocks) if port.name in block.results else i)
    found = {}
    for i, block in enumerate(blocks):
        own = {*block.sources.values(), *(f"{block.name}.{p.name}" for p in block.outputs)}
        found[block.name] = sum(n for s, n in sizes.items() if s not in own and first[s] <= i <= last[s])
    return found
