"""Reading a lowered block back and holding it against the block."""

from __future__ import annotations

from pathlib import Path

import onnx

from targets.exporting import reason
from targets.onnx import weights as store
from targets.onnx.storages import specs
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, Port
from toolchain.ir.dtypes import dtype_of
from toolchain.ir.target import distinct_functions


def check(folder: Path, block: Block) -> None:
    """Validate every model, and compare functions, ports and weights with the block's.

    Raises:
        LoweringError: a file cannot be read or is not valid, or names what differs.
    """
    found = {p.stem for p in folder.glob("*.onnx")}
    expected = set(distinct_functions(block))
    if found != expected:
        raise LoweringError(f"block '{block.name}': folder has functions {sorted(found)}, expected {sorted(expected)}")
    slots = store.layout(specs(block.weights))
    _check_size(folder, store.total_bytes(slots))
    for function in sorted(expected):
        model = read(folder / f"{function}.onnx")
        where = f"block '{block.name}', function '{function}'"
        for name in store.foreign(model, slots):
            raise LoweringError(f"{where}: weight '{name}' is not one of the block's, or has another place")
        signature = block.signatures[function]
        sides = (("inputs", model.graph.input, signature.inputs), ("outputs", model.graph.output, signature.outputs))
        for side, values, ports in sides:
            have, want = [_interface(v) for v in values], [_expected(p) for p in ports]
            if have != want:
                raise LoweringError(f"{where}: {side} are {have}, expected {want}")


def read(path: Path) -> onnx.ModelProto:
    """A model without its weights.

    Raises:
        LoweringError: it cannot be read, or is not valid.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        return onnx.load(str(path), load_external_data=False)
    except Exception as e:  # decoding errors are of many kinds
        name = f"{path.parent.name}/{path.name}"
        raise LoweringError(f"'{name}' is not a model that can be read back: {reason(e)}; lower it again") from e


def _check_size(folder: Path, expected: int) -> None:
    path = folder / store.FILE
    name = f"{folder.name}/{store.FILE}"
    if not path.is_file():
        raise LoweringError(f"'{name}' is missing; lower the block again")
    if path.stat().st_size != expected:
        raise LoweringError(f"'{name}' has {path.stat().st_size} bytes, expected {expected}; lower the block again")


def _interface(value: onnx.ValueInfoProto) -> tuple[str, tuple[int, ...], str]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return value.name, tuple(d.dim_value for d in tensor.shape.dim), dtype


def _expected(port: Port) -> tuple[str, tuple[int, ...], str]:
    return port.name, port.shape, dtype_of(port.dtype).name
