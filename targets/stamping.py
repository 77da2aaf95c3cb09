"""Cutting stretches out of a file, and writing it again with weights in their place, proving that they arrived."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch

from toolchain.errors import LoweringError, PrecisionError, ResourceError
from toolchain.ir.dtypes import dtype_of
from toolchain.ir.finite import finite

PIECE_BYTES = 1 << 22
CACHED_BYTES = 1 << 18
"""What a processor's cache holds while it is looked at twice."""
SERIAL_ELEMENTS = 1 << 15
"""Torch casts no more than these in one thread. With more it wakes others, which wait for work by spinning."""


class Hash(Protocol):
    """A digest that grows."""

    def update(self, data: memoryview, /) -> None: ...


@dataclass(frozen=True)
class Stretch:
    """A weight to insert: where it begins, as what it is stored, and what reads it when its turn comes.

    ``digest``, if there is one, is given the stored bytes.
    """

    offset: int
    size: int
    weight: str
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    digest: Hash | None = None


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; shared with it where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def stored_pieces(name: str, weight: torch.Tensor, dtype: torch.dtype, buffers: _Ring) -> Iterator[memoryview]:
    """The bytes of a weight as an artifact stores it, piece by piece, each in the next of ``buffers``.

    Raises:
        LoweringError: ``dtype`` cannot hold it, or it has numbers that are NaN or infinite; names it.
    """
    for part in weight.detach().reshape(-1).split(PIECE_BYTES // dtype.itemsize):
        stored = part if part.dtype == dtype else buffers.cast(part, dtype)
        if stored.dtype.is_floating_point and not finite(stored):
            if finite(part.float()):
                largest = float(weight.abs().max())
                raise PrecisionError(f"weight '{name}' reaches {largest:.3g}, which {dtype_of(dtype).name} cannot hold")
            raise LoweringError(f"weight '{name}' has numbers that are NaN or infinite; mend the checkpoint")
        yield raw(stored)


class _Ring:
    """Buffers that are used again: asking the system for new memory takes several times as long as filling it."""

    def __init__(self, count: int) -> None:
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(count)]
        self._floats = torch.empty(SERIAL_ELEMENTS)
        self._turn = 0

    def cast(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``part`` as ``dtype``, in the buffer that was used the longest time ago.

        By way of float32: torch casts bfloat16 to float16 thirteen times as slowly as in these two steps.
        """
        self._turn = (self._turn + 1) % len(self._buffers)
        whole = self._buffers[self._turn].view(dtype)[: part.numel()]
        for taken, given in zip(part.split(SERIAL_ELEMENTS), whole.split(SERIAL_ELEMENTS), strict=True):
            if torch.float32 not in (part.dtype, dtype):
                taken = self._floats[: taken.numel()].copy_(taken)
            given.copy_(taken)
        return whole


def cut(path: Path, places: Sequence[tuple[int, int]]) -> None:
    """Remove stretches (offset, size) from a file; what is left is what :func:`copy_with` takes."""
    part = path.with_name(f"{path.name}.part")
    with path.open("rb") as whole, part.open("wb", buffering=0) as rest:
        for offset, size in sorted(places):
            _copy(whole, rest, offset - whole.tell())
            whole.seek(size, os.SEEK_CUR)
        _copy(whole, rest, None)
    part.replace(path)


def copy_with(source: Path, out: Path, stretches: Sequence[Stretch]) -> str:
    """Write ``source``, a file after :func:`cut`, with ``stretches`` where others were cut out of it.

    While one piece is computed, the one before is written, and the one before that is read back and compared with
    what it should be, byte for byte; no more than these three are held.

    Returns:
        The sha256 of what was read back, which is the whole file.

    Raises:
        LoweringError: as :func:`stored_pieces`.
        ResourceError: what is read back is not what was written.
    """
    buffers = _Ring(3)
    with (
        source.open("rb") as template,
        out.open("wb", buffering=0) as stamped,
        out.open("rb", buffering=0) as written,
        _Stage() as reading,
        _Stage() as writing,
    ):
        back = _ReadBack(written)

        def put(stretch: Stretch, piece: memoryview, at: int) -> None:
            _copy(template, stamped, at - stamped.tell())
            _write(stamped, piece)
            reading.begin(back.compare, piece, at, stretch.digest)

        for stretch in sorted(stretches, key=lambda s: s.offset):
            at = stretch.offset
            for piece in stored_pieces(stretch.weight, stretch.read(), stretch.dtype, buffers):
                writing.begin(put, stretch, piece, at)
                at += piece.nbytes
            if at != stretch.offset + stretch.size:
                given = at - stretch.offset
                raise ValueError(f"{given} bytes for a place of {stretch.size} in '{source.name}'")
        writing.end()
        _copy(template, stamped, None)
        reading.end()
        return back.end()


class _ReadBack:
    """Reads a file again, behind the one who writes it."""

    def __init__(self, written: FileIO) -> None:
        self._written, self._digest = written, hashlib.sha256()
        self._buffer = np.empty(CACHED_BYTES, np.uint8)

    def compare(self, piece: memoryview, at: int, digest: Hash | None) -> None:
        """Read on to ``at``, then what should be ``piece``; ``digest`` is given that."""
        self._read(at - self._written.tell())
        expected = np.frombuffer(piece, np.uint8)
        for begin in range(0, len(expected), CACHED_BYTES):
            part = expected[begin : begin + CACHED_BYTES]
            if not _same(self._read(len(part)), part):
                raise ResourceError(
                    f"'{Path(self._written.name).name}': what was read back from byte {at + begin} on is not what was "
                    "written; check the disk"
                )
        if digest is not None:
            digest.update(piece)

    def end(self) -> str:
        """Read the rest; the sha256 of all."""
        while len(self._read(CACHED_BYTES)):
            pass
        return self._digest.hexdigest()

    def _read(self, count: int) -> np.ndarray:
        """Read ``count`` bytes, or as many as there are; returns the last that fit the buffer."""
        part = self._buffer[:0]
        while count > 0:
            part = self._buffer[: self._written.readinto(self._buffer[: min(count, CACHED_BYTES)].data)]
            if not len(part):
                break
            self._digest.update(part.data)
            count -= len(part)
        return part


class _Stage(ThreadPoolExecutor):
    """A thread that does one thing at a time; what fails in it is raised by the next call."""

    def __init__(self) -> None:
        super().__init__(1)
        self._pending: Future[None] | None = None

    def begin(self, work: Callable[..., None], *args: object) -> None:
        """Wait for what was begun before, and begin this."""
        self.end()
        self._pending = self.submit(work, *args)

    def end(self) -> None:
        """Wait for what was begun."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether bytes are equal: eight at a time as far as they go."""
    if len(a) != len(b):
        return False
    eights = len(a) // 8 * 8
    return np.array_equal(a[:eights].view(np.uint64), b[:eights].view(np.uint64)) and np.array_equal(
        a[eights:], b[eights:]
    )


def _write(out: FileIO, content: memoryview | bytes) -> None:
    """Write all of it: one call may write less."""
    left = memoryview(content)
    while left:
        left = left[out.write(left) or 0 :]


def _copy(source: BinaryIO, out: FileIO, count: int | None) -> None:
    """Copy the next ``count`` bytes, or all that are left."""
    while count is None or count > 0:
        part = source.read(PIECE_BYTES if count is None else min(count, PIECE_BYTES))
        if not part:
            return
        _write(out, part)
        if count is not None:
            count -= len(part)
