"""Replacing the weights of a Core ML package.

Weights are given as their stored parts: floats for what is kept plainly, and for scales and tables; integers for what
they scale or look up, which a file may pack into fewer bits. Tensors of ten elements and more lie in ``weight.bin`` as
blobs: at a multiple of 64 bytes a header (sentinel, type, size, offset), then the data. Smaller ones stand in the
program itself, as immediate values of constants. Two packages of one structure differ in nothing else. Stamping does
without coremltools, whose import takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from targets.coreml.dtypes import DTYPES, DType
from targets.coreml.program import KINDS
from targets.coreml.schema import MODEL, read_model
from targets.coreml.values import HEADER, SENTINEL
from targets.packing import pack
from targets.stamping import Stretch, copy_with, cut, raw
from toolchain.ir.affine import SCALE, ZERO
from toolchain.ir.palette import TABLE
from toolchain.ir.stored import MARK, part_key
from toolchain.ir.target import Artifact, Template, UnboundTemplateError

WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
ALIGNMENT = 64
FLOATS: Mapping[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
BLOB_TYPES: Mapping[int, DType] = {
    d.blob: d for d in DTYPES.values() if d.blob is not None and (d.name in FLOATS or d.bits <= 8)
}
"""Types of blobs that weights are stored as, by their number."""
HEAD = 16
"""Elements by which a blob is told from others before all are looked at: packed, they fill whole bytes."""
CONTENTS: Mapping[str, str] = {"floats": "float32", "bytes": "float16"}
"""Fields of tensors that stand in the program, and the floats that they hold."""
SMALL_PARTS: Mapping[str, str] = {"scale": SCALE, "offset": ZERO, "lut": TABLE}
"""Parameters of operators that decompress weights, and the parts that are given for them."""
LARGEST_IMMEDIATE = 9
"""Elements of the largest tensor that coremltools keeps in the program."""


@dataclass(frozen=True)
class Slot:
    """Where a weight, a stored part of one, or a stretch of it lies: which elements, in which file, at which byte.

    ``weight`` is the part's key; ``size`` is in bytes.
    """

    weight: str
    start: int
    count: int
    file: str
    offset: int
    size: int
    dtype: str


def blobs(data: mmap.mmap) -> Iterator[tuple[DType | None, int, int]]:
    """Type (None for wide integers), size and data offset of every blob of a ``weight.bin``, in order.

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
    weights = dict(weights)  # encoded once: every blob is looked for in all of them
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
    immediates = list(_immediates(artifact.path, weights, found))
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


def _find(blob: bytes, dtype: DType, offset: int, weights: Mapping[str, torch.Tensor]) -> Slot | None:
    """The part that a blob holds, or a stretch of which it holds; whole ones are looked for first; None for a constant.

    Raises:
        UnboundTemplateError: several parts hold it.
    """
    for find in (_as_whole, _as_stretch) if dtype.name in FLOATS else (_as_whole,):
        found = [
            Slot(name, start, count, WEIGHTS.as_posix(), offset, len(blob), dtype.name)
            for name, part in weights.items()
            for start, count in find(blob, dtype, part)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnboundTemplateError(f"the blob at byte {offset} is found in {len(found)} weights")
    return None


def _as_whole(blob: bytes, dtype: DType, part: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First element and number of elements, if a blob is all of a part."""
    count = part.numel()
    if _can_hold(dtype, part) and len(blob) == -(-count * dtype.bits // 8):
        head = bytes(raw(_stored(part.reshape(-1)[:HEAD], dtype)))
        if blob.startswith(head[: len(blob)]) and bytes(raw(_stored(part, dtype))) == blob:
            yield 0, count


def _as_stretch(blob: bytes, dtype: DType, part: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First element and number of elements, if a blob is a stretch of a part of floats."""
    size = dtype.bits // 8
    if _can_hold(dtype, part) and part.numel() * size > len(blob):
        at = bytes(raw(_stored(part, dtype))).find(blob)
        if at >= 0 and at % size == 0:
            yield at // size, len(blob) // size


def _can_hold(dtype: DType, part: torch.Tensor) -> bool:
    """Floats are stored as any float, integers as integers of the same sign and as few bits as they need."""
    if part.dtype.is_floating_point:
        return dtype.name in FLOATS
    return dtype.name not in FLOATS and dtype.is_signed == part.dtype.is_signed


def _stored(part: torch.Tensor, dtype: DType) -> torch.Tensor:
    """A part as a file holds it: floats cast, integers packed."""
    return part.to(FLOATS[dtype.name]) if dtype.name in FLOATS else pack(part, dtype.bits)


def _immediates(package: Path, weights: Mapping[str, torch.Tensor], found: Sequence[Slot]) -> Iterator[Slot]:
    """The program's values that hold small parts; ``found`` is what the weight file holds.

    Raises:
        UnboundTemplateError: a value's bytes are not found in the file.
    """
    if not any(part.numel() <= LARGEST_IMMEDIATE for part in weights.values()):
        return
    spec, _ = read_model(package)
    written = (package / MODEL).read_bytes()
    for key, dtype, tensor in (*_constants(spec, weights), *_decompressed(spec, weights, found)):
        content = _content(tensor)
        offset = _place(spec, tensor, written)
        if written[offset : offset + len(content)] != content:
            raise UnboundTemplateError(f"weight '{key}': its bytes are not found in the program's file")
        yield Slot(key, 0, weights[key].numel(), MODEL.as_posix(), offset, len(content), dtype)


def _constants(spec: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, Any]]:
    """Key, type and tensor of the constants that are small plain weights, told by their numbers."""
    small = {
        (dtype, bytes(raw(w.to(kind)))): name
        for name, w in weights.items()
        if w.numel() <= LARGEST_IMMEDIATE and MARK not in name
        for dtype, kind in FLOATS.items()
    }
    for operation in _operations(spec):
        if operation.type == "const" and operation.attributes["val"].HasField("immediateValue"):
            tensor = operation.attributes["val"].immediateValue.tensor
            if tensor.WhichOneof("value") in CONTENTS:
                dtype = CONTENTS[tensor.WhichOneof("value")]
                name = small.get((dtype, _content(tensor)))
                if name is not None:
                    yield name, dtype, tensor


def _decompressed(
    spec: Any, weights: Mapping[str, torch.Tensor], found: Sequence[Slot]
) -> Iterator[tuple[str, str, Any]]:
    """Key, type and tensor of small scales, zeros and tables, told by what else their operator is given.

    They are written with the operator. Their numbers would not tell them: tables of two numbers are much alike.
    """
    at = {slot.offset - ALIGNMENT: slot.weight for slot in found}
    for operation in _operations(spec):
        main = next((operation.inputs[n] for n in ("data", "indices") if n in operation.inputs), None)
        if main is None or not operation.type.startswith("constexpr_"):
            continue
        weight = at.get(main.arguments[0].value.blobFileValue.offset, "").rpartition(MARK)[0]
        for name, part in SMALL_PARTS.items():
            key = part_key(weight, part)
            if key not in weights or name not in operation.inputs:
                continue
            value = operation.inputs[name].arguments[0].value
            dtype = DTYPES[KINDS[value.type.tensorType.dataType]]
            if value.HasField("immediateValue") and value.immediateValue.tensor.WhichOneof("value") in CONTENTS:
                content = _content(value.immediateValue.tensor)
                if _can_hold(dtype, weights[key]) and content == bytes(raw(_stored(weights[key], dtype))):
                    yield key, dtype.name, value.immediateValue.tensor


def _operations(spec: Any) -> Iterator[Any]:
    for _, function in sorted(spec.mlProgram.functions.items()):
        yield from function.block_specializations[function.opset].operations


def _content(tensor: Any) -> bytes:
    """The bytes of a tensor that stands in the program."""
    return np.asarray(tensor.floats.values, "<f4").tobytes() if tensor.HasField("floats") else tensor.bytes.values


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


class _Small:
    """The parts of weights, by key; those in the program's file are kept when others of the same weight are read.

    For they are written last, and a weight that is asked for again would be encoded again.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], slots: Sequence[Slot]) -> None:
        self._weights, self._kept = weights, dict[str, torch.Tensor]()
        self._siblings: dict[str, list[str]] = {}
        for slot in slots:
            if MARK in slot.weight and slot.file == MODEL.as_posix():
                self._siblings.setdefault(slot.weight.rpartition(MARK)[0], []).append(slot.weight)

    def part(self, key: str) -> torch.Tensor:
        """One part."""
        if key in self._kept:
            return self._kept[key]
        found = self._weights[key]
        for sibling in self._siblings.get(key.rpartition(MARK)[0], ()):
            self._kept[sibling] = self._weights[sibling]
        return found


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    slots = [Slot(**s) for s in template.slots]
    source = template.artifact.path
    last: dict[str, torch.Tensor] = {}
    small = _Small(weights, slots)

    def read(slot: Slot) -> torch.Tensor:
        if slot.weight not in last:  # a weight's stretches follow one another: each tensor is read once
            last.clear()
            last[slot.weight] = small.part(slot.weight).reshape(-1)
        part = last[slot.weight][slot.start : slot.start + slot.count]
        return part if slot.dtype in FLOATS else pack(part, DTYPES[slot.dtype].bits)

    stretches: dict[str, list[Stretch]] = {}
    for slot in slots:
        dtype = FLOATS.get(slot.dtype, torch.uint8)
        stretch = Stretch(slot.offset, slot.size, slot.weight, dtype, functools.partial(read, slot))
        stretches.setdefault(slot.file, []).append(stretch)
    shutil.copytree(source, out, ignore=lambda _, names: [n for n in names if n == WEIGHTS.name])
    if (source / WEIGHTS).is_file():
        stretches.setdefault(WEIGHTS.as_posix(), [])
    digests = {out / file: copy_with(source / file, out / file, replaced) for file, replaced in stretches.items()}
    return Artifact(out, template.artifact.functions, digests)
