"""Constants of an ML program: values written in the program itself, and blobs of its weight file.

A weight file is a row of blobs, each at a multiple of 64 bytes: a header (sentinel, type, size in bytes,
offset of the data), then the data; see coremltools' ``mlmodel/src/MILBlob/Blob``. Values narrower than a
byte are packed from the least significant bit upwards.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from targets.coreml.dtypes import DTYPES, DType, held_as

HEADER = struct.Struct("<IIQQ")
SENTINEL = 0xDEADBEEF
KEPT_BYTES = 1 << 16
"""Constants up to this size are kept once they have been read."""


class MalformedError(Exception):
    """A package's program or weight file is not what it should be; says what and where."""


class WeightFile:
    """A weight file, mapped into memory: nothing is read until it is used."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:  # copy on write, and never written: torch has no read-only tensors
            self._bytes: np.ndarray[Any, np.dtype[np.uint8]] = np.memmap(path, np.uint8, "c")
        except (OSError, ValueError) as e:
            raise MalformedError(f"weight file '{path.name}' cannot be read: {e}") from e

    def blob(self, at: int, dtype: DType, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of the blob whose header is at byte ``at``: ``count`` values of ``dtype``.

        Raises:
            MalformedError: there is no such blob.
        """
        where = f"blob at byte {at} of '{self.name}'"
        if at + HEADER.size > len(self._bytes):
            raise MalformedError(f"{where}: the file ends at byte {len(self._bytes)}")
        sentinel, kind, size, start = HEADER.unpack(self._bytes[at : at + HEADER.size].tobytes())
        if sentinel != SENTINEL:
            raise MalformedError(f"{where}: there is none")
        if kind != dtype.blob:
            found = next((d.name for d in DTYPES.values() if d.blob == kind), f"type {kind}")
            raise MalformedError(f"{where}: holds {found}, the program says {dtype.name}")
        needed = -(-count * dtype.bits // 8)
        if size != needed or start + size > len(self._bytes):
            raise MalformedError(f"{where}: {size} of {needed} bytes, from {start} of {len(self._bytes)}")
        return self._bytes[start : start + size]


class Constant:
    """A tensor, scalar or string known when the program was made.

    Args:
        data: the values: bytes as a weight file has them (with ``source`` and ``offset`` instead, they are
            read when used), or a sequence of Python values.
    """

    def __init__(
        self,
        dtype: DType,
        shape: tuple[int, ...],
        data: Any = None,
        source: WeightFile | None = None,
        offset: int = 0,
    ) -> None:
        self.dtype, self.shape = dtype, shape
        self._data, self._source, self._offset = data, source, offset
        self._kept: torch.Tensor | None = None
        if source is not None:
            source.blob(offset, dtype, math.prod(shape))  # fail when loaded, not when run

    def tensor(self, native: bool = False) -> torch.Tensor:
        """The values, as the engine holds their type. Do not write to it."""
        if self._kept is None:
            tensor = self._read().reshape(self.shape)
            if self._source is not None and tensor.numel() * tensor.itemsize > KEPT_BYTES:
                return tensor.to(held_as(self.dtype, native))
            self._kept = tensor
        return self._kept.to(held_as(self.dtype, native))

    def value(self) -> Any:
        """The value in Python: a number, string or bool, or lists of them."""
        if self.dtype.name == "string":
            return self._data[0] if self.shape == () else list(self._data)
        return self.tensor().tolist()

    def _read(self) -> torch.Tensor:
        count = math.prod(self.shape)
        if self._source is not None:
            return unpack(self._source.blob(self._offset, self.dtype, count), self.dtype, count)
        if isinstance(self._data, bytes):
            return unpack(np.frombuffer(bytearray(self._data), np.uint8), self.dtype, count)
        return torch.tensor(list(self._data), dtype=held_as(self.dtype))


def unpack(data: np.ndarray[Any, np.dtype[np.uint8]], dtype: DType, count: int) -> torch.Tensor:
    """The first ``count`` values of packed bytes, as a flat tensor."""
    if dtype.bits >= 8:
        return torch.from_numpy(data.view(np.dtype(dtype.name)))
    if 8 % dtype.bits == 0:
        shifts = torch.arange(0, 8, dtype.bits, dtype=torch.uint8)
        values = (torch.from_numpy(data)[:, None] >> shifts) & (2**dtype.bits - 1)
    else:
        bits = np.unpackbits(data, bitorder="little")
        whole = bits[: len(bits) // dtype.bits * dtype.bits].reshape(-1, dtype.bits)
        values = torch.from_numpy(np.packbits(whole, axis=1, bitorder="little"))
    values = values.flatten()[:count]
    if dtype.is_signed:
        sign = 2 ** (dtype.bits - 1)
        return (values.to(torch.int8) ^ sign) - sign
    return values
