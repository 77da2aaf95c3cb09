"""Cutting stretches out of a file, and writing it again with others in their place, proving that they arrived."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from toolchain.errors import LoweringError, ResourceError

CHUNK_BYTES = 1 << 24
PIECE = 1 << 16
EXPONENTS = {torch.float16: (np.uint16, 0x7C00), torch.float32: (np.uint32, 0x7F800000)}
"""Numbers whose exponent has all bits set are infinite or none."""


@dataclass(frozen=True)
class Stretch:
    """Bytes to insert: where they begin, how many they are, and what computes them when their turn comes."""

    offset: int
    size: int
    content: Callable[[], memoryview]


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; shared with it where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def as_stored(name: str, weight: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a weight as an artifact stores it.

    Raises:
        LoweringError: ``dtype`` cannot hold it, or it has numbers that are infinite or none; names it.
    """
    stored = weight.to(dtype)
    if not _finite(stored):
        if _finite(weight.float()):
            peak = float(weight.abs().max())
            raise LoweringError(
                f"weight '{name}' reaches {peak:.3g}, which {_name(dtype)} cannot hold; set precision: float32"
            )
        raise LoweringError(f"weight '{name}' has numbers that are infinite or none (NaN); mend the checkpoint")
    return raw(stored)


def _finite(tensor: torch.Tensor) -> bool:
    """By the exponents' bits, in pieces that stay in the processor's cache: isfinite takes thirty times as long."""
    kind, exponent = EXPONENTS[tensor.dtype]
    bits = np.frombuffer(raw(tensor), kind)
    return not any(
        np.equal(np.bitwise_and(bits[at : at + PIECE], exponent), exponent).any() for at in range(0, len(bits), PIECE)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cut(path: Path, places: Sequence[tuple[int, int]]) -> None:
    """Remove stretches (offset, size) from a file; what is left is what :func:`copy_with` takes."""
    part = path.with_name(f"{path.name}.part")
    with path.open("rb") as whole, part.open("wb", buffering=0) as rest:
        for offset, size in sorted(places):
            _copy(whole, rest, offset - whole.tell())
            whole.seek(size, os.SEEK_CUR)
        _copy(whole, rest, None)
    part.replace(path)


def copy_with(source: Path, out: Path, stretches: Sequence[Stretch]) -> None:
    """Write ``source``, a file after :func:`cut`, with ``stretches`` where others were cut out of it.

    Two are held in memory at a time. Each is read back and compared with what it should be, byte for byte.

    Raises:
        ResourceError: what is read back is not what was written.
    """
    with source.open("rb") as template, out.open("wb", buffering=0) as stamped, ThreadPoolExecutor(1) as comparing:
        pending: Future[None] | None = None
        for stretch in sorted(stretches, key=lambda s: s.offset):
            content = stretch.content()
            if content.nbytes != stretch.size:
                raise ValueError(f"{content.nbytes} bytes for a place of {stretch.size} in '{source.name}'")
            _copy(template, stamped, stretch.offset - stamped.tell())
            if pending is not None:
                pending.result()
            _write(stamped, content)
            pending = comparing.submit(_compare, out, stretch.offset, content)  # while the next one is computed
            del content
        _copy(template, stamped, None)
        if pending is not None:
            pending.result()


def _compare(path: Path, offset: int, content: memoryview) -> None:
    expected = np.frombuffer(content, np.uint8)
    buffer = np.empty(min(CHUNK_BYTES, len(expected)), np.uint8)
    with path.open("rb", buffering=0) as f:
        f.seek(offset)
        for at in range(0, len(expected), CHUNK_BYTES):
            part = buffer[: len(expected) - at]
            if f.readinto(part.data) != len(part) or not np.array_equal(part, expected[at : at + CHUNK_BYTES]):
                raise ResourceError(
                    f"'{path.name}': what was read back from byte {offset + at} on is not what was written; "
                    "check the disk"
                )


def _write(out: FileIO, content: memoryview | bytes) -> None:
    """Write all of it: one call may write less."""
    left = memoryview(content)
    while left:
        left = left[out.write(left) or 0 :]


def _copy(source: BinaryIO, out: FileIO, count: int | None) -> None:
    """Copy the next ``count`` bytes, or all that are left."""
    while count is None or count > 0:
        part = source.read(CHUNK_BYTES if count is None else min(count, CHUNK_BYTES))
        if not part:
            return
        _write(out, part)
        if count is not None:
            count -= len(part)
