"""Replacing the weights of a Core ML package.

Tensors of ten elements and more lie in ``weight.bin`` as blobs: at a multiple of 64 bytes a header (sentinel, type,
size, offset), then the data. Smaller ones stand in the program itself, as immediate values of constants. Two
packages of one structure differ in nothing else. Stamping does without coremltools, whose import takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from targets.coreml.schema import MODEL, read_model
from targets.coreml.values import HEADER, SENTINEL
from targets.stamping import Stretch, copy_with, cut, raw
from toolchain.ir.dtypes import DTYPES, dtype_of
from toolchain.ir.target import Artifact, Template, UnboundTemplateError

WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
ALIGNMENT = 64
BLOB_TYPES: Mapping[int, torch.dtype] = {1: torch.float16, 2: torch.float32}
LARGEST_IMMEDIATE = 9
"""Elements of the largest tensor that coremltools keeps in the program."""


@dataclass(frozen=True)
class Slot:
    """Where a weight, or a part of one, lies: in which file of the package, which elements, and at which byte."""

    weight: str
    start: int
    count: int
    file: str
    offset: int
    dtype: str

    @property
    def size(self) -> int:
        return self.count * DTYPES[self.dtype].bytes


def blobs(data: mmap.mmap) -> Iterator[tuple[torch.dtype | None, int, int]]:
    """Type (None for integers), size and data offset of every blob of a ``weight.bin``, in order.

    Raises:
        UnboundTemplateError: the file has another layout than the one that is known.
    """
    at = ALIGNMENT
    while at < len(data):
        sentinel, kind, size, offset = HEADER.unpack_from(data, at)
        if sentinel != SENTINEL or offset != at + ALIGNMENT:
            raise UnboundTemplateError(f"weight.bin has no blob at byte {at}")
        yield BLOB_TYPES.get(kind), size, offset
        at = -(-(offset + size) // ALIGNMENT) * ALIGNMENT


def bind(artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    found: list[Slot] = []
    constants: list[list[Any]] = []
    file = artifact.path / WEIGHTS
    if file.is_file() and file.stat().st_size > ALIGNMENT:
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for dtype, size, offset in blobs(data):
                blob = data[offset : offset + size]
                slot = _find(blob, dtype, offset, weights) if dtype is not None else None
                if slot is not None:
                    found.append(slot)
                else:
                    constants.append([offset, hashlib.sha256(blob).hexdigest()])
    immediates = list(_immediates(artifact.path, weights))
    covered = dict.fromkeys(weights, 0)
    for slot in found:
        covered[slot.weight] += slot.count
    for name in {slot.weight for slot in immediates}:
        covered[name] += weights[name].numel()
    for name, weight in weights.items():
        if covered[name] != weight.numel():
            part = f"{covered[name]} of {weight.numel()} elements"
            raise UnboundTemplateError(f"weight '{name}': {part} are in the package")
    slots = [*found, *immediates]
    for name in {slot.file for slot in slots}:
        cut(artifact.path / name, [(s.offset, s.size) for s in slots if s.file == name])
    return Template(artifact, [asdict(s) for s in slots], constants)


def _find(blob: bytes, dtype: torch.dtype, offset: int, weights: Mapping[str, torch.Tensor]) -> Slot | None:
    """The weight, or the part of one, that a blob holds, whole ones being looked for first; None for a constant.

    Raises:
        UnboundTemplateError: several weights hold it.
    """
    size = dtype.itemsize
    count = len(blob) // size
    head = blob[: 16 * size]
    for whole in (True, False):
        found = []
        for name, weight in weights.items():
            if weight.numel() < count or whole != (weight.numel() == count):
                continue
            if whole and bytes(raw(weight.reshape(-1)[:16].to(dtype))) != head:
                continue
            content = bytes(raw(weight.to(dtype)))
            at = 0 if whole and content == blob else content.find(blob) if not whole else -1
            if at >= 0 and at % size == 0:
                found.append(Slot(name, at // size, count, WEIGHTS.as_posix(), offset, dtype_of(dtype).name))
        if len(found) == 1:
            return found[0]
        if found:
            raise UnboundTemplateError(f"the blob at byte {offset} is found in {len(found)} weights")
    return None


def _immediates(package: Path, weights: Mapping[str, torch.Tensor]) -> Iterator[Slot]:
    """The program's constants that hold small weights.

    Raises:
        UnboundTemplateError: a constant's bytes are not found in the file.
    """
    small = {
        (dtype_of(dtype).name, bytes(raw(w.to(dtype)))): name
        for name, w in weights.items()
        if w.numel() <= LARGEST_IMMEDIATE
        for dtype in BLOB_TYPES.values()
    }
    if not small:
        return
    spec, _ = read_model(package)
    written = (package / MODEL).read_bytes()
    for tensor in _float_constants(spec):
        dtype = "float32" if tensor.WhichOneof("value") == "floats" else "float16"
        content = np.asarray(tensor.floats.values, "<f4").tobytes() if dtype == "float32" else tensor.bytes.values
        name = small.get((dtype, content))
        if name is not None:
            offset = _place(spec, tensor, written)
            if written[offset : offset + len(content)] != content:
                raise UnboundTemplateError(f"weight '{name}': its bytes are not found in the program's file")
            yield Slot(name, 0, weights[name].numel(), MODEL.as_posix(), offset, dtype)


def _float_constants(spec: Any) -> Iterator[Any]:
    """The tensors of floats that stand in the program itself."""
    for _, function in sorted(spec.mlProgram.functions.items()):
        for operation in function.block_specializations[function.opset].operations:
            if operation.type == "const" and operation.attributes["val"].HasField("immediateValue"):
                tensor = operation.attributes["val"].immediateValue.tensor
                if tensor.WhichOneof("value") in ("floats", "bytes"):
                    yield tensor


def _place(spec: Any, tensor: Any, written: bytes) -> int:
    """The byte of the program's file at which a constant begins: where the file changes if its first number does."""
    if tensor.WhichOneof("value") == "floats":
        values, sign = tensor.floats.values, 3  # of the four bytes of a float32, the last has its sign
        first = values[0]
        values[0] = -first
        changed = spec.SerializeToString(deterministic=True)
        values[0] = first
    else:
        content, sign = bytes(tensor.bytes.values), 0
        tensor.bytes.values = bytes([content[0] ^ 0xFF]) + content[1:]
        changed = spec.SerializeToString(deterministic=True)
        tensor.bytes.values = content
    if len(changed) != len(written):
        return len(written)
    before, after = np.frombuffer(written, np.uint8), np.frombuffer(changed, np.uint8)
    differing = np.flatnonzero(before != after)
    return int(differing[0]) - sign if len(differing) == 1 else len(written)


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    slots = [Slot(**s) for s in template.slots]
    source = template.artifact.path
    last: dict[str, torch.Tensor] = {}

    def read(slot: Slot) -> torch.Tensor:
        if slot.weight not in last:  # a weight's parts follow one another: each tensor is read once
            last.clear()
            last[slot.weight] = weights[slot.weight].reshape(-1)
        return last[slot.weight][slot.start : slot.start + slot.count]

    stretches: dict[str, list[Stretch]] = {}
    for slot in slots:
        dtype = DTYPES[slot.dtype].torch
        stretch = Stretch(slot.offset, slot.size, slot.weight, dtype, functools.partial(read, slot))
        stretches.setdefault(slot.file, []).append(stretch)
    shutil.copytree(source, out, ignore=lambda _, names: [n for n in names if n == WEIGHTS.name])
    if (source / WEIGHTS).is_file():
        stretches.setdefault(WEIGHTS.as_posix(), [])
    digests = {out / file: copy_with(source / file, out / file, replaced) for file, replaced in stretches.items()}
    return Artifact(out, template.artifact.functions, digests)
