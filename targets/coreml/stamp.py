"""Replacing the weights of a Core ML package.

All tensors of ten elements and more lie in ``weight.bin`` as blobs: at a multiple of 64 bytes a header
(sentinel, type, size, offset), then the data. Two packages of one structure differ in nothing else.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.target import Artifact, Template, UnboundTemplateError

WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
SENTINEL = 0xDEADBEEF
ALIGNMENT = 64
HEADER = struct.Struct("<IIQQ")
TYPES: Mapping[int, np.dtype[Any]] = {1: np.dtype(np.float16), 2: np.dtype(np.float32)}


@dataclass(frozen=True)
class Slot:
    """A blob: where its data lies, and which elements of which weight it holds."""

    weight: str
    start: int
    count: int
    offset: int
    dtype: str


def blobs(data: bytes) -> Iterator[tuple[np.dtype[Any], int, int]]:
    """Type, size and data offset of every blob of a ``weight.bin``, in order.

    Raises:
        UnboundTemplateError: the file has another layout than the one that is known.
    """
    at = ALIGNMENT
    while at < len(data):
        sentinel, kind, size, offset = HEADER.unpack_from(data, at)
        if sentinel != SENTINEL or kind not in TYPES or offset != at + ALIGNMENT:
            raise UnboundTemplateError(f"weight.bin has no blob of floats at byte {at}")
        yield TYPES[kind], size, offset
        at = -(-(offset + size) // ALIGNMENT) * ALIGNMENT


def bind(artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    data = (artifact.path / WEIGHTS).read_bytes()
    covered = dict.fromkeys(weights, 0)
    slots = []
    for dtype, size, offset in blobs(data):
        slot = _find(data[offset : offset + size], dtype, offset, weights)
        slots.append(slot)
        covered[slot.weight] += slot.count
    for name, weight in weights.items():
        if covered[name] != weight.numel():
            part = f"{covered[name]} of {weight.numel()} elements"
            raise UnboundTemplateError(f"weight '{name}': {part} are in weight.bin")
    return Template(artifact, tuple(slots))


def _find(blob: bytes, dtype: np.dtype[Any], offset: int, weights: Mapping[str, torch.Tensor]) -> Slot:
    found = []
    for name, weight in weights.items():
        whole = weight.numpy().astype(dtype).tobytes()
        at = whole.find(blob)
        if at >= 0 and at % dtype.itemsize == 0:
            found.append(Slot(name, at // dtype.itemsize, len(blob) // dtype.itemsize, offset, dtype.str))
    if len(found) != 1:
        raise UnboundTemplateError(f"the blob at byte {offset} is found in {len(found)} weights")
    return found[0]


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    shutil.copytree(template.artifact.path, out)
    with (out / WEIGHTS).open("r+b") as f:
        for slot in template.slots:
            values = weights[slot.weight].reshape(-1)[slot.start : slot.start + slot.count]
            f.seek(slot.offset)
            f.write(values.numpy().astype(np.dtype(slot.dtype)).tobytes())
    return Artifact(out, template.artifact.functions)
