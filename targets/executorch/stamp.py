"""Replacing the weights of an ExecuTorch program.

A program holds each tensor once. Those that XNNPACK uses are found at run time by a key, which occurs in the program's
index and in every subgraph that uses the tensor: the sha256 of the stored bytes in hex. The values of a quantized
weight have a key of ours, see :func:`_keys`.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from targets.packing import pack
from targets.stamping import Stretch, copy_with, cut, raw
from toolchain.ir.affine import SCALE
from toolchain.ir.dtypes import DTYPES, dtype_of
from toolchain.ir.storage import VALUES
from toolchain.ir.stored import MARK, part_key
from toolchain.ir.target import Artifact, Template, UnboundTemplateError

Layout = Literal["rows", "channels last", "nibbles"]
"""How numbers lie: in order, with dimension 1 last, or unsigned with the middle at 8, two a byte, the first one low."""


@dataclass(frozen=True)
class Slot:
    """Where a part's bytes lie, in which type and layout, and where its key stands."""

    weight: str
    dtype: str
    layout: Layout
    offset: int
    size: int
    keys: list[int]


def bind(artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    with artifact.path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as program:
        found, digests = [], {}
        for name, weight in weights.items():
            slot = _find(program, name, weight)
            digests[name] = hashlib.sha256(program[slot.offset : slot.offset + slot.size]).hexdigest()
            found.append(slot)
        keys = _keys(digests)
        for slot in found:
            for key in {digests[slot.weight], keys[slot.weight]}:
                slot.keys.extend(_occurrences(program, key.encode()))
    if len({slot.offset for slot in found}) < len(found):
        raise UnboundTemplateError("two weights are found in the same place of the program")
    cut(artifact.path, [(slot.offset, slot.size) for slot in found])
    return Template(artifact, [asdict(s) for s in found])


def _find(program: mmap.mmap, name: str, weight: torch.Tensor) -> Slot:
    found = []
    for layout in _layouts(weight):
        stored = raw(_laid_out(weight, layout))
        for offset in _occurrences(program, bytes(stored)):
            found.append(Slot(name, dtype_of(weight.dtype).name, layout, offset, len(stored), []))
    if len(found) != 1:
        raise UnboundTemplateError(f"weight '{name}' is found {len(found)} times in the program")
    return found[0]


def _occurrences(program: mmap.mmap, pattern: bytes) -> Iterator[int]:
    at = program.find(pattern)
    while at >= 0:
        yield at
        at = program.find(pattern, at + 1)


def _layouts(weight: torch.Tensor) -> Iterator[Layout]:
    """How a part may lie in a program."""
    yield "rows"
    if weight.dim() == 4 and weight.shape[2:].numel() > 1:
        yield "channels last"  # of convolutions that XNNPACK runs
    if weight.dtype == torch.int8 and weight.numel() % 2 == 0 and int(weight.min()) >= -8 and int(weight.max()) <= 7:
        yield "nibbles"


def _laid_out(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    if layout == "nibbles":
        return pack(weight, 4).bitwise_xor_(0x88)
    return weight.permute(0, 2, 3, 1) if layout == "channels last" else weight


def _keys(digests: Mapping[str, str]) -> dict[str, str]:
    """Parts' keys, given the sha256 of what is stored for each.

    Runtimes keep what they have packed of a layer by the keys of its values and its bias. A layer with another's values
    and other scales would be taken for that one; so the key of values depends on the scales, too.
    """
    keys = dict(digests)
    for name, digest in digests.items():
        weight, mark, part = name.rpartition(MARK)
        if mark and part == VALUES:
            keys[name] = hashlib.sha256(f"{digest}{digests[part_key(weight, SCALE)]}".encode()).hexdigest()
    return keys


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    slots = [Slot(**s) for s in template.slots]
    digests = {slot.weight: hashlib.sha256() for slot in slots}

    def read(slot: Slot) -> torch.Tensor:
        return _laid_out(weights[slot.weight], slot.layout)

    def stretch(slot: Slot) -> Stretch:
        stored = torch.uint8 if slot.layout == "nibbles" else DTYPES[slot.dtype].torch
        return Stretch(slot.offset, slot.size, slot.weight, stored, functools.partial(read, slot), digests[slot.weight])

    copy_with(template.artifact.path, out, [stretch(slot) for slot in slots])
    keys = _keys({name: digest.hexdigest() for name, digest in digests.items()})
    with out.open("r+b") as program:
        for slot in slots:
            for at in slot.keys:
                program.seek(at)
                program.write(keys[slot.weight].encode())
    return Artifact(out, template.artifact.functions)
