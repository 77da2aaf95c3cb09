"""The file of a block's weights, which the models of all its functions read.

Weights, or the parts of those that are quantized, lie in the order of their names, as raw little-endian numbers in
C order; between them are zeros. Large ones start at a page, so that a runtime can map them into memory, as the ONNX
format advises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from targets.onnx.packing import packed
from targets.onnx.storages import Form, Spec
from targets.stamping import raw

FILE = "weights.bin"
PAGE = 4096
SMALL = 64
"""Alignment in bytes of tensors that are smaller than a page."""
TYPES: Mapping[Form, int] = {
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "uint8": TensorProto.UINT8,
    "uint4": TensorProto.UINT8,
}
"""What models declare."""


@dataclass(frozen=True)
class Slot:
    """Where a weight, or a part of one, lies: ``size`` bytes from ``offset`` on."""

    weight: str
    spec: Spec
    offset: int
    size: int

    def reference(self, shape: tuple[int, ...] | None = None) -> TensorProto:
        """It as a model's initializer: its name, and where its data is. ``shape``, if it is not the slot's own."""
        shape = self.spec.shape if shape is None else shape
        tensor = TensorProto(name=self.weight, dims=shape, data_type=TYPES[self.spec.form])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", FILE), ("offset", self.offset), ("length", self.size)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def layout(specs: Mapping[str, Spec]) -> dict[str, Slot]:
    """Where each part lies, by key; depends on nothing but keys and specs."""
    slots = {}
    end = 0
    for key, spec in sorted(specs.items()):
        alignment = PAGE if spec.bytes >= PAGE else SMALL
        offset = -(-end // alignment) * alignment
        slots[key] = Slot(key, spec, offset, spec.bytes)
        end = offset + spec.bytes
    return slots


def total_bytes(slots: Mapping[str, Slot]) -> int:
    """Size of the file."""
    return max((s.offset + s.size for s in slots.values()), default=0)


def outside(model: onnx.ModelProto) -> list[TensorProto]:
    """The tensors that a model looks for outside itself."""
    return [t for t in model.graph.initializer if onnx.external_data_helper.uses_external_data(t)]


def foreign(model: onnx.ModelProto, slots: Mapping[str, Slot]) -> list[str]:
    """Names of the tensors that a model looks for outside itself, but not in the place of a slot."""
    return [t.name for t in outside(model) if t.name not in slots or not _is_at(t, slots[t.name])]


def _is_at(tensor: TensorProto, slot: Slot) -> bool:
    shape = tuple(tensor.dims)
    return math.prod(shape) == math.prod(slot.spec.shape) and tensor == slot.reference(shape)


def declared(model: onnx.ModelProto) -> Iterator[tuple[str, Spec]]:
    """What a model says of the parts that it looks for outside itself; operators tell how many bits a number has."""
    nibbles = {
        name
        for node in model.graph.node
        if any(a.name == "bits" and helper.get_attribute_value(a) == 4 for a in node.attribute)
        for name in node.input
    }
    forms: dict[int, Form] = {t: form for form, t in TYPES.items() if form != "uint4"}
    for tensor in outside(model):
        form = forms.get(tensor.data_type, "float32")
        yield tensor.name, Spec("uint4" if form == "uint8" and tensor.name in nibbles else form, tuple(tensor.dims))


def write(path: Path, slots: Mapping[str, Slot], parts: Mapping[str, torch.Tensor]) -> None:
    """Write the file, one part after the other; nothing that is float32 is copied in memory.

    Raises:
        ValueError: a weight has another type or another size than its slot.
    """
    with path.open("wb") as file:
        for slot in slots.values():
            stored = packed(parts[slot.weight], slot.spec.form)
            if stored.dtype != dtype(slot.spec.form) or stored.nbytes != slot.size:
                raise ValueError(f"weight '{slot.weight}' is {stored.dtype} {tuple(stored.shape)}, not {slot.spec}")
            file.write(bytes(slot.offset - file.tell()))
            file.write(raw(stored))


def dtype(form: Form) -> torch.dtype:
    """The type of the tensors that are written."""
    return torch.float32 if form == "float32" else torch.int8 if form == "int8" else torch.uint8
