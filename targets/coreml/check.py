"""Reading a package back and holding its interface against the block's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.frontend.milproto.load import load as load_program

from targets.coreml.schema import read_model
from targets.streams import quiet
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block
from toolchain.ir.target import distinct_functions, port_dtype

Interface = tuple[list[tuple[str, tuple[int, ...], str]], list[tuple[str, tuple[int, ...], str]]]


def check(package: Path, block: Block, precision: str) -> None:
    """Parse the package and its weights into a program; compare functions and ports.

    Raises:
        LoweringError: the package cannot be read, or names what differs.
    """
    found = interfaces(package)
    expected = set(distinct_functions(block))
    if set(found) != expected:
        raise LoweringError(f"block '{block.name}': package has functions {sorted(found)}, expected {sorted(expected)}")
    for function, interface in found.items():
        signature = block.signatures[function]
        for side, have, ports in zip(
            ("inputs", "outputs"), interface, (signature.inputs, signature.outputs), strict=True
        ):
            want = [(p.name, p.shape, port_dtype(p, precision).name) for p in ports]
            if have != want:
                raise LoweringError(f"block '{block.name}', function '{function}': {side} are {have}, expected {want}")


def interfaces(package: Path) -> dict[str, Interface]:
    """Inputs and outputs (name, shape, dtype) of every function, read from the saved program itself."""
    with quiet():
        try:
            model, folder = read_model(package)  # coremltools' own reader writes the manifest anew
            spec = ct.proto.Model_pb2.Model.FromString(model.SerializeToString())
            program = load_program(spec, spec.specificationVersion, file_weights_dir=str(folder / "weights"))
        except Exception as e:
            raise LoweringError(f"'{package.name}' is not a package that can be read back: {e}") from e
    return {
        name: ([_port(k, v) for k, v in f.inputs.items()], [_port(v.name, v) for v in f.outputs])
        for name, f in program.functions.items()
    }


def _port(name: str, value: Any) -> tuple[str, tuple[int, ...], str]:
    from coremltools.converters.mil.mil.types.type_mapping import nptype_from_builtin

    return name, tuple(int(s) for s in value.shape), np.dtype(nptype_from_builtin(value.dtype)).name
