"""Where a parameter's numbers come from, and how they are kept: n tensors → one parameter → its stored parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.ir.storage import FLOAT32, Plain, Storage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightSource:
    """A parameter's numbers, given a checkpoint's tensors by their official names.

    ``tensors`` are concatenated along ``concat``; of the result, ``narrow`` takes ``(dim, start, length)`` and
    ``select`` takes ``(dim, index)``, each in order; what is left is viewed as ``shape``. So a model may fuse what
    checkpoints keep apart, take a part of what they fuse, and write a convolution's tap or a patch embedding as a
    matrix.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    select: tuple[tuple[int, int], ...] = ()
    narrow: tuple[tuple[int, int, int], ...] = ()
    concat: int = 0

    @property
    def is_part(self) -> bool:
        """Whether some of the tensors' numbers are left out."""
        return bool(self.select or self.narrow)

    def value(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The parameter; ``read`` gives a checkpoint's tensor by its official name, and is asked for one at a time."""
        if len(self.tensors) == 1:
            whole = read(self.tensors[0])
        else:
            import torch

            whole = torch.cat([read(name) for name in self.tensors], dim=self.concat)
        for dim, start, length in self.narrow:
            whole = whole.narrow(dim, start, length)
        for dim, index in self.select:
            whole = whole.select(dim, index)
        return whole.reshape(self.shape)

    def put(self, tensors: Sequence[torch.Tensor], value: torch.Tensor) -> list[torch.Tensor]:
        """``tensors``, as :meth:`value` reads them, with ``value`` in the parameter's place; what is left out stays."""
        import torch

        whole = torch.cat(list(tensors), dim=self.concat) if len(tensors) > 1 else tensors[0].clone()
        place = whole
        for dim, start, length in self.narrow:
            place = place.narrow(dim, start, length)
        for dim, index in self.select:
            place = place.select(dim, index)
        place.copy_(value.reshape(place.shape))
        if len(tensors) == 1:
            return [whole]
        return list(torch.split(whole, [t.shape[self.concat] for t in tensors], dim=self.concat))

    def describe(self) -> list[object]:
        """All but the tensors' names, as plain data: with the tensors' digests it decides the numbers."""
        return [
            list(self.shape),
            [list(s) for s in self.select],
            [list(n) for n in self.narrow],
            self.concat if len(self.tensors) > 1 else 0,
        ]


@dataclass(frozen=True)
class Weight:
    """A parameter of a graph or a block: its source, and how artifacts keep it."""

    source: WeightSource
    storage: Storage = FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return math.prod(self.source.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its stored parts."""
        return self.storage.bytes(self.source.shape)


def quantized(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Those that are kept as no plain numbers."""
    return {name: weight for name, weight in weights.items() if not isinstance(weight.storage, Plain)}
