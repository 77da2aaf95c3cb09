"""The file of a block's weights, which the models of all its functions read.

Tensors lie in the order of their names, as raw little-endian float32 in C order; between them are zeros. Large
ones start at a page, so that a runtime can map them into memory, as the ONNX format advises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from targets.stamping import raw

FILE = "weights.bin"
PAGE = 4096
SMALL = 64
"""Alignment in bytes of tensors that are smaller than a page."""


@dataclass(frozen=True)
class Slot:
    """Where a weight lies: ``size`` bytes from ``offset`` on, float32 of ``shape``."""

    weight: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def reference(self) -> onnx.TensorProto:
        """The weight as a model's initializer: its name, and where its data is."""
        tensor = onnx.TensorProto(name=self.weight, dims=self.shape, data_type=onnx.TensorProto.FLOAT)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", FILE), ("offset", self.offset), ("length", self.size)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Where each weight lies, by name; depends on nothing but names and shapes."""
    slots = {}
    end = 0
    for name, shape in sorted(shapes.items()):
        size = 4 * torch.Size(shape).numel()
        alignment = PAGE if size >= PAGE else SMALL
        offset = -(-end // alignment) * alignment
        slots[name] = Slot(name, tuple(shape), offset, size)
        end = offset + size
    return slots


def total_bytes(slots: Mapping[str, Slot]) -> int:
    """Size of the file."""
    return max((s.offset + s.size for s in slots.values()), default=0)


def foreign(model: onnx.ModelProto, slots: Mapping[str, Slot]) -> list[str]:
    """Names of the tensors that a model looks for outside itself, but not in the place of a slot."""
    outside = [t for t in model.graph.initializer if onnx.external_data_helper.uses_external_data(t)]
    return [t.name for t in outside if t.name not in slots or t != slots[t.name].reference()]


def write(path: Path, slots: Mapping[str, Slot], weights: Mapping[str, torch.Tensor]) -> None:
    """Write the file, one tensor after the other; no tensor is copied in memory.

    Raises:
        ValueError: a weight has another shape than its slot, or is not float32.
    """
    with path.open("wb") as file:
        for slot in slots.values():
            tensor = weights[slot.weight]
            if tuple(tensor.shape) != slot.shape or tensor.dtype != torch.float32:
                raise ValueError(f"weight '{slot.weight}' is {tensor.dtype} {tuple(tensor.shape)}, not {slot.shape}")
            file.write(bytes(slot.offset - file.tell()))
            file.write(raw(tensor))
