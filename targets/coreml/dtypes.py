"""The types that an ML program declares, and the torch types in which the engine holds their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DType:
    """A type of the program. ``bits`` is its width as stored; ``blob`` its number in weight files, if it has one."""

    name: str
    bits: int
    blob: int | None = None

    @property
    def is_float(self) -> bool:
        return self.name.startswith("float")

    @property
    def is_signed(self) -> bool:
        return not self.name.startswith("u")


DTYPES: Mapping[str, DType] = {
    d.name: d
    for d in (
        DType("bool", 8),
        DType("string", 0),
        DType("float16", 16, 1),
        DType("float32", 32, 2),
        DType("float64", 64),
        DType("uint8", 8, 3),
        DType("int8", 8, 4),
        DType("int16", 16, 6),
        DType("uint16", 16, 7),
        DType("int4", 4, 8),
        DType("uint1", 1, 9),
        DType("uint2", 2, 10),
        DType("uint4", 4, 11),
        DType("uint3", 3, 12),
        DType("uint6", 6, 13),
        DType("int32", 32, 14),
        DType("uint32", 32, 15),
        DType("int64", 64),
    )
}
"""By name. Weight files number them as MILBlob's ``BlobDataType`` does."""

ALIASES: Mapping[str, str] = {"fp16": "float16", "fp32": "float32", "fp64": "float64", "string": "string"}
"""Names that ``cast`` and its like use."""

_HELD: Mapping[str, torch.dtype] = {
    "bool": torch.bool,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,  # torch computes little in unsigned 16 and 32 bits
    "int32": torch.int32,
    "uint32": torch.int64,
    "int64": torch.int64,
}


def held_as(dtype: DType, native: bool = False) -> torch.dtype:
    """The torch type that holds values of ``dtype``.

    Args:
        native: hold float16 as it is; otherwise as float32 that has been rounded to float16.
    """
    if dtype.name == "float16":
        return torch.float16 if native else torch.float32
    if dtype.bits < 8:
        return torch.int8 if dtype.is_signed else torch.uint8
    return _HELD[dtype.name]
