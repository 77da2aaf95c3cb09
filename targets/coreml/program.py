"""Reading a package's ML program into functions of operations, without building a MIL program of it.

Source: coremltools' ``mlmodel/format/MIL.proto``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets.coreml.dtypes import DTYPES, DType
from targets.coreml.schema import read_model, schema
from targets.coreml.values import Constant, MalformedError, WeightFile

KINDS: Mapping[int, str] = {number: name.lower() for name, number in schema("MIL_pb2").DataType.items()}


@dataclass(frozen=True)
class Tensor:
    """A value's name, type and shape; sizes known only at run time are ``None``."""

    name: str
    dtype: DType
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Ref:
    """A use of an earlier value by name."""

    name: str


Argument = Ref | Constant | tuple["Ref | Constant", ...]


@dataclass(frozen=True)
class Operation:
    """One operation: its operator, its name (of its first output), arguments by parameter, and outputs."""

    type: str
    name: str
    arguments: Mapping[str, Argument]
    outputs: tuple[Tensor, ...]
    nests: bool = False
    """It has blocks of its own: control flow."""


@dataclass(frozen=True)
class Function:
    """A function of the program; ``constants`` are the values that operations refer to and none computes."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Constant]
    operations: tuple[Operation, ...]


def read_program(package: Path) -> dict[str, Function]:
    """The functions of a saved package, by name. Weights are mapped, not read.

    Raises:
        MalformedError: the package is damaged, is no ML program, or has what this reader does not know.
    """
    try:
        spec, folder = read_model(package)
    except FileNotFoundError as e:
        raise MalformedError(f"no package: there is no '{e.filename}'") from e
    except Exception as e:  # the file system's, JSON's and protobuf's
        raise MalformedError(f"cannot be read as a package: {' '.join(str(e).split())}") from e
    if spec.WhichOneof("Type") != "mlProgram":
        raise MalformedError(f"is a {spec.WhichOneof('Type')} model, not an ML program; convert it to one")
    reader = _Reader(folder)
    try:
        return {name: reader.function(name, f) for name, f in spec.mlProgram.functions.items()}
    except (LookupError, ValueError, TypeError, OverflowError) as e:  # a message that lacks what every program has
        raise MalformedError(f"has a program that cannot be read: {' '.join(str(e).split())}") from e


class _Reader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, WeightFile] = {}

    def function(self, name: str, spec: Any) -> Function:
        block = spec.block_specializations[spec.opset]
        constants: dict[str, Constant] = {}
        operations = []
        for op in block.operations:
            where = f"function '{name}', operator '{_name(op)}' ({op.type})"
            try:
                if op.type == "const":
                    constants[op.outputs[0].name] = self._constant(op.attributes["val"])
                else:
                    operations.append(self._operation(op))
            except MalformedError as e:
                raise MalformedError(f"{where}: {e}") from e
        inputs = tuple(_tensor(i) for i in spec.inputs)
        return Function(inputs, tuple(block.outputs), constants, tuple(operations))

    def _operation(self, op: Any) -> Operation:
        given = {k: self._constant(v) for k, v in op.attributes.items() if k != "name"}
        bound = {k: self._argument(v) for k, v in op.inputs.items()}
        return Operation(op.type, _name(op), given | bound, tuple(_tensor(o) for o in op.outputs), bool(op.blocks))

    def _argument(self, argument: Any) -> Argument:
        bindings = [self._constant(b.value) if b.HasField("value") else Ref(b.name) for b in argument.arguments]
        return bindings[0] if len(bindings) == 1 else tuple(bindings)

    def _constant(self, value: Any) -> Constant:
        dtype, shape = _type(value.type)
        if None in shape:
            raise MalformedError("a constant of unknown size")
        sizes = tuple(int(s) for s in shape if s is not None)
        if value.WhichOneof("value") == "blobFileValue":
            name = value.blobFileValue.fileName.removeprefix("@model_path/")
            if name.startswith("/") or ".." in name.split("/"):
                raise MalformedError(f"weight file '{name}' is outside the package")
            if name not in self._files:
                self._files[name] = WeightFile(self._folder / name)
            return Constant(dtype, sizes, source=self._files[name], offset=value.blobFileValue.offset)
        kind = value.immediateValue.WhichOneof("value")
        if kind != "tensor":
            raise MalformedError(f"a constant that is a {kind}")
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        return Constant(dtype, sizes, getattr(tensor, field).values if field else ())


def _name(op: Any) -> str:
    return str(op.outputs[0].name) if op.outputs else ""


def _tensor(named: Any) -> Tensor:
    return Tensor(named.name, *_type(named.type))


def _type(value_type: Any) -> tuple[DType, tuple[int | None, ...]]:
    kind = value_type.WhichOneof("type")
    if kind != "tensorType":
        raise MalformedError(f"a value that is no tensor ({kind}); this engine has tensors only")
    tensor = value_type.tensorType
    name = KINDS.get(tensor.dataType, str(tensor.dataType))
    if name not in DTYPES:
        raise MalformedError(f"a value of type {name}; this engine knows {', '.join(DTYPES)}")
    sizes = (int(d.constant.size) if d.HasField("constant") else None for d in tensor.dimensions)
    return DTYPES[name], tuple(sizes)
