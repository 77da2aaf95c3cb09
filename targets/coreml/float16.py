"""The pass by which coremltools makes a program float16, with a choice of operators and in less memory."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from toolchain.ir.dtypes import FLOAT16_MAX

NAMESPACE = "sora_compile"
OWN_PASS = f"{NAMESPACE}::cast_to_float16"
REPLACED_PASS = "common::add_fp16_cast"
ANGLE_OPS = ("sin", "cos")
INFINITE = 1e38
PIECE = 1 << 20
"""Numbers of a constant that are looked at in one go."""


@register_pass(namespace=NAMESPACE, name="cast_to_float16", override=True)
class CastToFloat16(FP16ComputePrecision):
    """Casts every operator but angles to float16, unless a constant of its overflows."""

    def __init__(self) -> None:
        super().__init__(op_selector=_not_an_angle)

    @staticmethod
    def fp16_overflow(op: Any) -> bool:
        """Whether float16 cannot hold one of an operator's constants: the base's answer, in a fortieth of the memory.

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


def with_own_float16(pipeline: ct.PassPipeline) -> ct.PassPipeline:
    """``pipeline``, edited so that :class:`CastToFloat16` stands where coremltools' own pass stood.

    Raises:
        ValueError: coremltools' own pass is not in it.
    """
    pipeline.passes = [OWN_PASS if p == REPLACED_PASS else p for p in pipeline.passes]
    if OWN_PASS not in pipeline.passes:
        raise ValueError(f"coremltools has no pass '{REPLACED_PASS}' any more; see what took its place")
    return pipeline


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
