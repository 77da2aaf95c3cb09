"""Lowering a block to a Core ML package."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

from targets.coreml.canonical import canonicalise
from targets.exporting import export, reason
from targets.streams import quiet
from toolchain.accuracy.metrics import FLOAT16_MAX
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, Port
from toolchain.ir.target import Artifact, distinct_functions
from toolchain.system.disk import full_disk_named
from toolchain.system.memory import release

ANGLE_OPS = ("sin", "cos")
PIECE = 1 << 20
INFINITE = 1e38
PRECISIONS = {"float16": (ct.precision.FLOAT16, np.float16), "float32": (ct.precision.FLOAT32, np.float32)}


def lower(block: Block, weights: Mapping[str, torch.Tensor], out: Path, precision: str) -> Artifact:
    """One package with a function per function; their equal weights are stored once.

    A block with one function gets a plain package, whose function Core ML calls ``main``.
    """
    functions = distinct_functions(block)
    own = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-")
    with quiet(), own as tmp, full_disk_named(out.parent):
        packages = {}
        for f in functions:
            packages[f] = _convert(block, f, weights, precision, Path(tmp) / f"{f}.mlpackage")
            release()
        merged = ct.utils.MultiFunctionDescriptor()
        for function, path in packages.items():
            merged.add_function(str(path), src_function_name="main", target_function_name=function)
        merged.default_function_name = "base"
        ct.utils.save_multifunction(merged, str(out))
    canonicalise(out)
    return Artifact(out, functions)


def _convert(block: Block, function: str, weights: Mapping[str, torch.Tensor], precision: str, path: Path) -> Path:
    compute, _ = PRECISIONS[precision]
    if precision == "float16":
        compute = ct.transform.FP16ComputePrecision(op_selector=_not_an_angle)
    program = export(block, function, weights)
    signature = block.signatures[function]
    try:
        with mock.patch.object(FP16ComputePrecision, "fp16_overflow", staticmethod(_overflows)):
            model = ct.convert(
                program,
                convert_to="mlprogram",
                inputs=[
                    ct.TensorType(name=p.name, shape=p.shape, dtype=port_dtype(p, precision)) for p in signature.inputs
                ],
                outputs=[ct.TensorType(name=p.name, dtype=port_dtype(p, precision)) for p in signature.outputs],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=compute,
                skip_model_load=True,
            )
        model.save(str(path))
    except Exception as e:  # the converter raises whatever it likes
        raise LoweringError(f"block '{block.name}', function '{function}': Core ML cannot lower it: {reason(e)}") from e
    return path


def _overflows(op: Any) -> bool:
    """Whether float16 cannot hold one of an operator's constants: what coremltools asks, in a fortieth of the memory.

    Infinities, and what stands for them, may overflow.
    """
    for given in op.inputs.values():
        for var in given if isinstance(given, list | tuple) else (given,):
            if var.op is None or var.op.op_type != "const" or not var.is_tensor_or_scalar_of(dtype="fp32"):
                continue
            numbers = np.asarray(var.val).reshape(-1)
            for at in range(0, len(numbers), PIECE):
                sizes = np.abs(numbers[at : at + PIECE])
                if np.any((sizes > FLOAT16_MAX) & (sizes < INFINITE)):
                    return True
    return False


def port_dtype(port: Port, precision: str) -> Any:
    """The numpy dtype of a port in the package."""
    if not port.dtype.is_floating_point:
        return np.int32
    return np.float32 if port.exact else PRECISIONS[precision][1]


def _not_an_angle(op: Any) -> bool:
    """False for sines, cosines and the arithmetic that leads to them.

    A timestep of 977 times a frequency is an angle that float16 rounds by half a radian.
    """
    if op.op_type in ANGLE_OPS:
        return False
    users = [user for out in op.outputs for user in out.child_ops]
    return not users or not all(user.op_type in ANGLE_OPS or _leads_to_angle(user) for user in users)


def _leads_to_angle(op: Any) -> bool:
    users = [user for out in op.outputs for user in out.child_ops]
    return bool(users) and all(user.op_type in ANGLE_OPS or _leads_to_angle(user) for user in users)
