"""Replacing the weights of an ExecuTorch program.

A program holds each float32 tensor once. Those that XNNPACK uses are found at run time by a key, the sha256
of the stored bytes in hex, which occurs in the program's index and in every subgraph that uses the tensor.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from targets.stamping import Stretch, copy_with, cut, raw
from toolchain.ir.target import Artifact, Template, UnboundTemplateError


@dataclass(frozen=True)
class Slot:
    """Where a weight's bytes lie, in which layout, and where its key stands."""

    weight: str
    channels_last: bool
    offset: int
    size: int
    keys: list[int]


def bind(artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
    with artifact.path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as program:
        slots = [_find(program, name, weight) for name, weight in weights.items()]
    if len({slot.offset for slot in slots}) < len(slots):
        raise UnboundTemplateError("two weights are found in the same place of the program")
    cut(artifact.path, [(slot.offset, slot.size) for slot in slots])
    return Template(artifact, [asdict(s) for s in slots])


def _find(program: mmap.mmap, name: str, weight: torch.Tensor) -> Slot:
    found = []
    permuted = weight.dim() == 4 and weight.shape[2:].numel() > 1
    for channels_last in (False, True) if permuted else (False,):
        stored = raw(_laid_out(weight, channels_last))
        offsets = list(_occurrences(program, bytes(stored)))
        keys = list(_occurrences(program, _key(stored).encode()))
        found += [Slot(name, channels_last, offset, len(stored), keys) for offset in offsets]
    if len(found) != 1:
        raise UnboundTemplateError(f"weight '{name}' is found {len(found)} times in the program")
    return found[0]


def _occurrences(program: mmap.mmap, pattern: bytes) -> Iterator[int]:
    at = program.find(pattern)
    while at >= 0:
        yield at
        at = program.find(pattern, at + 1)


def _laid_out(weight: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A weight as it is stored: convolutions that XNNPACK runs have their channels last."""
    return weight.permute(0, 2, 3, 1) if channels_last else weight


def _key(stored: memoryview) -> str:
    return hashlib.sha256(stored).hexdigest()


def stamp(template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    slots = [Slot(**s) for s in template.slots]
    keys = {slot.weight: hashlib.sha256() for slot in slots}

    def read(slot: Slot) -> torch.Tensor:
        return _laid_out(weights[slot.weight], slot.channels_last)

    stretches = [
        Stretch(s.offset, s.size, s.weight, torch.float32, functools.partial(read, s), keys[s.weight]) for s in slots
    ]
    copy_with(template.artifact.path, out, stretches)
    with out.open("r+b") as program:
        for slot in slots:
            for at in slot.keys:
                program.seek(at)
                program.write(keys[slot.weight].hexdigest().encode())
    return Artifact(out, template.artifact.functions)
