"""The one table of number formats: what they are called in manifests, graph texts, checkpoints and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import torch

FLOAT16_MAX: Final = 65504.0
"""The largest float16 number."""

INT8_ACTIVATIONS: Final = "int8"
"""What the gate's limits call the precision of artifacts that round activations to eight bits before they multiply."""

PortType = Literal["float16", "bfloat16", "float32", "int32"]
"""What a block may take and give."""


@dataclass(frozen=True)
class DType:
    """A number format. ``name`` is torch's and numpy's, ``short`` is what graph texts show.

    ``safetensors`` is its name in a safetensors header; ``rounding`` half of the distance from 1 to the next
    number, the largest relative error of rounding to it (0 for integers).
    """

    name: str
    bytes: int
    short: str
    safetensors: str
    rounding: float = 0.0

    @property
    def is_float(self) -> bool:
        return self.rounding > 0.0

    @property
    def torch(self) -> torch.dtype:
        """The same as torch's type; imports torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


DTYPES: Final[Mapping[str, DType]] = MappingProxyType(
    {
        d.name: d
        for d in (
            DType("float64", 8, "f64", "F64", 2.0**-53),
            DType("float32", 4, "f32", "F32", 2.0**-24),
            DType("float16", 2, "f16", "F16", 2.0**-11),
            DType("bfloat16", 2, "bf16", "BF16", 2.0**-8),
            DType("int64", 8, "i64", "I64"),
            DType("int32", 4, "i32", "I32"),
            DType("int16", 2, "i16", "I16"),
            DType("int8", 1, "i8", "I8"),
            DType("uint8", 1, "u8", "U8"),
            DType("bool", 1, "bool", "BOOL"),
        )
    }
)
"""By name."""

BY_SAFETENSORS: Final[Mapping[str, DType]] = MappingProxyType({d.safetensors: d for d in DTYPES.values()})


def dtype_of(dtype: torch.dtype) -> DType:
    """The table's entry for torch's type.

    Raises:
        KeyError: the table has none.
    """
    return DTYPES[str(dtype).removeprefix("torch.")]
