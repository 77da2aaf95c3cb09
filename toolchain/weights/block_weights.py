"""A block's weights, read from the checkpoint one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from toolchain.ir.blocks import Block
from toolchain.models.family import Definition
from toolchain.weights.checkpoint import Checkpoint

HALVES = (torch.float16, torch.bfloat16)


class BlockWeights(Mapping[str, torch.Tensor]):
    """The weights of ``block`` as float32, by its own names; every access reads one tensor anew.

    Nothing is kept, so that whoever takes one tensor after the other never holds more than that one.
    ``dict(weights)`` reads all of them.

    Args:
        halves: leave float16 and bfloat16 as they are, for those who store them as something else at once.
    """

    def __init__(
        self, block: Block, checkpoint: Checkpoint, aliases: Mapping[str, str], *, halves: bool = False
    ) -> None:
        self._kept = HALVES if halves else ()
        self._sources, self._checkpoint = block.weights, checkpoint
        self._name = _Names(checkpoint, aliases)

    def __getitem__(self, name: str) -> torch.Tensor:
        source = self._sources[name]
        weight = source.of(self._checkpoint.tensor(self._name(source.tensor)))
        return (weight if weight.dtype in self._kept else weight.float()).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class _Names:
    """The name under which a checkpoint holds an official tensor: its own, or its alias."""

    def __init__(self, checkpoint: Checkpoint, aliases: Mapping[str, str]) -> None:
        self._held, self._aliases = checkpoint.infos(), aliases

    def __call__(self, name: str) -> str:
        return name if name in self._held else self._aliases.get(name, name)


def read_named(checkpoint: Checkpoint, definition: Definition) -> dict[str, torch.Tensor]:
    """All of a component's weights as float32, by official name; for those who want it whole."""
    name = _Names(checkpoint, definition.aliases)
    return {n: checkpoint.tensor(name(n)).float() for n in definition.expected}
