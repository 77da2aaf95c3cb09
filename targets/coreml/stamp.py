"""Replacing the weights of a Core ML package.

Tensors of ten elements and more lie in ``weight.bin`` as blobs: at a multiple of 64 bytes a header (sentinel, type,
size, offset), then the data. Smaller ones stand in the program itself, as immediate values of constants. Two
packages of one structure differ in nothing else.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from targets.coreml.canonical import MODEL
from targets.coreml.values import HEADER, SENTINEL
from targets.stamping import Stretch, copy_with, raw
from targets.streams import quiet
from toolchain.target import Artifact, Template, UnboundTemplateError

WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
ALIGNMENT = 64
BLOB_TYPES: Mapping[int, torch.dtype] = {1: torch.float16, 2: torch.float32}
NAMES = {torch.float16: "float16", torch.float32: "float32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
LARGEST_IMMEDIATE = 9
"""Elements of the largest tensor that coremltools keeps in the program."""


@dataclass(frozen=True)
class Blob:
    """A blob: where its data lies, and which elements of which weight it holds."""

    weight: str
    start: int
    count: int
    offset: int
    dtype: str


@dataclass(frozen=True)
class Immediate:
    """A constant of the program: in which function, at which operation, and which weight it holds."""

    weight: str
    function: str
    operation: int
    dtype: str


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
    found: list[Blob] = []
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
    slots = {"blobs": [asdict(s) for s in found], "immediates": [asdict(s) for s in immediates]}
    return Template(artifact, slots, constants)


def _find(blob: bytes, dtype: torch.dtype, offset: int, weights: Mapping[str, torch.Tensor]) -> Blob | None:
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
                found.append(Blob(name, at // size, count, offset, NAMES[dtype]))
        if len(found) == 1:
            return found[0]
        if found:
            raise UnboundTemplateError(f"the blob at byte {offset} is found in {len(found)} weights")
    return None


def _immediates(package: Path, weights: Mapping[str, torch.Tensor]) -> Iterator[Immediate]:
    """The program's constants that hold small weights."""
    small = {
        (NAMES[dtype], bytes(raw(w.to(dtype)))): name
        for name, w in weights.items()
        if w.numel() <= LARGEST_IMMEDIATE
        for dtype in NAMES
    }
    if not small:
        return
    for function, index, dtype, content in _constants(_load(package)):
        name = small.get((dtype, content))
        if name is not None:
            yield Immediate(name, function, index, dtype)


def _load(package: Path) -> Any:
    with quiet():
        import coremltools as ct

    return ct.utils.load_spec(str(package))


def _operations(spec: Any, function: str) -> Any:
    specialised = spec.mlProgram.functions[function]
    return specialised.block_specializations[specialised.opset].operations


def _constants(spec: Any) -> Iterator[tuple[str, int, str, bytes]]:
    """Function, operation, dtype and content of every constant of floats in the program."""
    for function in sorted(spec.mlProgram.functions):
        for index, operation in enumerate(_operations(spec, function)):
            if operation.type == "const" and operation.attributes["val"].HasField("immediateValue"):
                tensor = operation.attributes["val"].immediateValue.tensor
                if tensor.WhichOneof("value") == "floats":
                    yield function, index, "float32", np.asarray(tensor.floats.values, np.float32).tobytes()
                elif tensor.WhichOneof("value") == "bytes":
                    yield function, index, "float16", bytes(tensor.bytes.values)


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    found = [Blob(**s) for s in template.slots["blobs"]]
    immediates = [Immediate(**s) for s in template.slots["immediates"]]
    source = template.artifact.path
    last: dict[str, torch.Tensor] = {}

    def weight(name: str) -> torch.Tensor:
        if name not in last:  # a weight's parts follow one another: each tensor is read once
            last.clear()
            last[name] = weights[name].reshape(-1)
        return last[name]

    def content(slot: Blob) -> memoryview:
        return raw(weight(slot.weight)[slot.start : slot.start + slot.count].to(DTYPES[slot.dtype]))

    def ignore(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if n == WEIGHTS.name]

    shutil.copytree(source, out, ignore=ignore)
    if (source / WEIGHTS).is_file():
        stretches = [
            Stretch(s.offset, s.count * DTYPES[s.dtype].itemsize, lambda s=s: content(s))  # type: ignore[misc]
            for s in found
        ]
        copy_with(source / WEIGHTS, out / WEIGHTS, stretches)
    if immediates:
        spec = _load(out)
        for slot in immediates:
            tensor = _operations(spec, slot.function)[slot.operation].attributes["val"].immediateValue.tensor
            values = weight(slot.weight).to(DTYPES[slot.dtype])
            if slot.dtype == "float32":
                tensor.floats.values[:] = values.tolist()
            else:
                tensor.bytes.values = bytes(raw(values))
        (out / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    return Artifact(out, template.artifact.functions)
