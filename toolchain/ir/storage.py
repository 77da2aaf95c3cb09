"""How a weight is kept in an artifact: which named parts stand for it, and what they decode to.

A storage is an option of a weight, not of a model: each weight of a graph has its own, passes may change it, and a
target says which storages it can express. Whatever it cannot is refused when a build is planned.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolchain.ir.dtypes import DTYPES, DType

if TYPE_CHECKING:
    import torch

Need = Literal["importance", "moments"]
"""What a storage has to know of a layer's activations to encode its weight; see :mod:`toolchain.ir.calibration`."""


@dataclass(frozen=True)
class Part:
    """One tensor of a stored weight. ``name`` is empty where it is the weight itself.

    ``bits`` is what a number takes when it is packed, if that is fewer than ``dtype`` has.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    bits: int | None = None

    @property
    def bytes(self) -> int:
        """Size of its packed numbers, without what a file adds for alignment."""
        return -(-math.prod(self.shape) * (self.bits or 8 * self.dtype.bytes) // 8)


class Storage(abc.ABC):
    """A way to keep a weight. Equal storages compare equal and have equal names; the name is part of cache keys."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What people, manifests and targets call it: ``float16``."""

    @abc.abstractmethod
    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """What is stored for a weight of ``shape``, in order."""

    @property
    def needs(self) -> Need | None:
        """What :meth:`encode` has to be given besides the weight; None for storages that go by the weight alone."""
        return None

    @property
    def uncalibrated(self) -> Storage:
        """A storage with the same parts that goes by the weight alone: what templates are lowered with."""
        return self

    @abc.abstractmethod
    def encode(self, weight: torch.Tensor, statistic: torch.Tensor | None = None) -> Mapping[str, torch.Tensor]:
        """The parts by name, of the shapes and types that :meth:`parts` says, for ``weight`` of any floating type.

        Args:
            statistic: what :attr:`needs` says.
        """

    @abc.abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight that the stored parts stand for, float32: what the eager reference of an artifact runs on."""

    def refusal(self, shape: Sequence[int]) -> str | None:
        """Why a weight of ``shape`` cannot be kept so; None if it can."""
        return None

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a weight of ``shape``."""
        return sum(part.bytes for part in self.parts(shape))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Plain(Storage):
    """Every number by itself, in a floating type."""

    dtype: DType

    @property
    def name(self) -> str:
        return self.dtype.name

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        return (Part("", tuple(shape), self.dtype),)

    def encode(self, weight: torch.Tensor, statistic: torch.Tensor | None = None) -> Mapping[str, torch.Tensor]:
        return {"": weight.to(self.dtype.torch)}

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts[""].float()


FLOAT32 = Plain(DTYPES["float32"])
FLOAT16 = Plain(DTYPES["float16"])
BFLOAT16 = Plain(DTYPES["bfloat16"])
PLAIN: Mapping[str, Plain] = {s.name: s for s in (FLOAT32, FLOAT16, BFLOAT16)}
"""Plain storages by name."""
