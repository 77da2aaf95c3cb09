"""Linear layers over int8 numbers times int8 numbers, computed as such.

A program says ``quantize``, ``dequantize``, and ``linear`` over that and over ``constexpr_blockwise_shift_scale``. One
by one, both operands would be rounded to the program's type before they are multiplied. Core ML runs the whole as one
product of integers where the processor has it (A17 Pro, M4), and so does the engine: sums are exact, whatever their
size, and are scaled and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from targets.coreml.ops.registry import described
from targets.coreml.program import Function, Ref
from targets.coreml.steps import Bound, Step
from targets.coreml.values import Constant

EXACT = 1 << 10
"""Products of int8 numbers that float32 adds up exactly: each is at most 2^14, and whole numbers to 2^24 are exact."""


def integer_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x [..., K]`` and ``weight [N, K]``, int8; ``x_scale []``, ``weight_scale [N, 1]``; float32 ``[..., N]``."""
    return integer_product(x, weight).float() * (x_scale.float() * weight_scale.float()[:, 0]) + (
        0.0 if bias is None else bias.float()
    )


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [..., K]`` times ``weight [N, K]``, int8, in int32: exact for K up to 131072, by exact sums in float32."""
    total = torch.zeros((), dtype=torch.int32)
    for taken, times in zip(x.split(EXACT, -1), weight.split(EXACT, -1), strict=True):
        total = total + torch.nn.functional.linear(taken.float(), times.float()).to(torch.int32)
    return total


INTEGER_LINEAR = described(integer_linear)


def with_integer_products(steps: Sequence[Step], function: Function) -> list[Step]:
    """``steps`` with every linear layer of integers as one; what only such layers read is left out."""
    by_output = {t.name: step for step in steps for t in step.operation.outputs}
    fused = [_fused(step, by_output, function.constants) or step for step in steps]
    read = {name for step in fused for name in step.reads} | set(function.outputs)
    before = {name for step in steps for name in step.reads}
    return [s for s in fused if any(t.name in read or t.name not in before for t in s.operation.outputs)]


def _fused(step: Step, by_output: Mapping[str, Step], constants: Mapping[str, Constant]) -> Step | None:
    if step.operation.type != "linear":
        return None
    x, weight = (_made_by(step.arguments[name], by_output) for name in ("x", "weight"))
    if x is None or x.operation.type != "dequantize" or x.arguments.keys() != {"input", "scale"}:
        return None
    whole = _made_by(x.arguments["input"], by_output)
    if whole is None or whole.operation.type != "quantize" or whole.operation.outputs[0].dtype.name != "int8":
        return None
    if weight is None or weight.operation.type != "constexpr_blockwise_shift_scale":
        return None
    if weight.arguments.keys() != {"data", "scale"}:
        return None
    data, scale, x_scale = (
        _constant(a, constants) for a in (weight.arguments["data"], weight.arguments["scale"], x.arguments["scale"])
    )
    if data is None or scale is None or x_scale is None:
        return None
    if data.dtype.name != "int8" or scale.shape != (data.shape[0], 1) or x_scale.shape != ():
        return None
    arguments = {"x": x.arguments["input"], "x_scale": x.arguments["scale"]}
    arguments |= {"weight": weight.arguments["data"], "weight_scale": weight.arguments["scale"]}
    arguments |= {"bias": step.arguments["bias"]} if "bias" in step.arguments else {}
    return dataclasses.replace(step, operator=INTEGER_LINEAR, arguments=arguments)


def _made_by(argument: Bound | tuple[Bound, ...], by_output: Mapping[str, Step]) -> Step | None:
    return by_output.get(argument.name) if isinstance(argument, Ref) else None


def _constant(argument: Bound | tuple[Bound, ...], constants: Mapping[str, Constant]) -> Constant | None:
    if isinstance(argument, Ref):
        return constants.get(argument.name)
    return argument if isinstance(argument, Constant) else None
