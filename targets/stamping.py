"""Writing a copy of a file in which some stretches are replaced, and proving that they arrived."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from toolchain.errors import ResourceError

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Stretch:
    """Bytes to replace: where they begin, how many they are, and what computes them when their turn comes."""

    offset: int
    size: int
    content: Callable[[], memoryview]


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; shared with it where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def copy_with(source: Path, out: Path, stretches: Sequence[Stretch]) -> list[str]:
    """Copy ``source`` to ``out`` with ``stretches`` replaced, one held in memory at a time.

    What was written is read back and held against the digest of what should have been.

    Returns:
        sha256 of each stretch, in the order given.

    Raises:
        ResourceError: a stretch on disk is not what was written.
    """
    order = sorted(range(len(stretches)), key=lambda i: stretches[i].offset)
    digests = [""] * len(stretches)
    with source.open("rb") as template, out.open("wb") as stamped, ThreadPoolExecutor(1) as hashing:
        for i in order:
            stretch = stretches[i]
            _copy(template, stamped, stretch.offset - stamped.tell())
            content = stretch.content()
            if content.nbytes != stretch.size:
                raise ValueError(f"{content.nbytes} bytes for a place of {stretch.size} in '{source.name}'")
            digest = hashing.submit(_digest, content)  # while it is written
            stamped.write(content)
            digests[i] = digest.result()
            template.seek(stretch.size, os.SEEK_CUR)
            del content, digest
        _copy(template, stamped, None)
    check(out, [(s.offset, s.size) for s in stretches], digests)
    return digests


def check(path: Path, places: Sequence[tuple[int, int]], digests: Sequence[str]) -> None:
    """Read stretches (offset and size) of a file back and hold them against their digests."""
    with path.open("rb") as f, ThreadPoolExecutor(os.cpu_count()) as hashing:
        found = hashing.map(lambda p: _digest_at(f.fileno(), *p), places)
        for (offset, _), digest, expected in zip(places, found, digests, strict=True):
            if digest != expected:
                raise ResourceError(
                    f"'{path.name}': what was read back at byte {offset} is not what was written; check the disk"
                )


def _digest(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_at(file: int, offset: int, size: int) -> str:
    """sha256 of ``size`` bytes of a file, or of what there is of them."""
    whole = hashlib.sha256()
    while size > 0 and (part := os.pread(file, min(size, CHUNK_BYTES), offset)):
        whole.update(part)
        offset, size = offset + len(part), size - len(part)
    return whole.hexdigest()


def _copy(source: BinaryIO, out: BinaryIO, count: int | None) -> None:
    """Copy the next ``count`` bytes, or all that are left."""
    while count is None or count > 0:
        part = source.read(CHUNK_BYTES if count is None else min(count, CHUNK_BYTES))
        if not part:
            return
        out.write(part)
        if count is not None:
            count -= len(part)
