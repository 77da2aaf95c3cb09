"""Elementwise arithmetic, comparison and logic, with NumPy's broadcasting.

Source: ``elementwise_binary.py`` and ``elementwise_unary.py`` in coremltools' ``mil/ops/defs``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from targets.coreml.dtypes import ALIASES, DTYPES, held_as
from targets.coreml.ops.registry import operator


@operator("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@operator("sub")
def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


@operator("mul")
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@operator("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Integers divide to integers, towards zero: the result has their type."""
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


@operator("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


@operator("mod")
def mod(x: Tensor, y: Tensor) -> Tensor:
    """The remainder of ``floor_div``: it has the divisor's sign."""
    return torch.remainder(x, y)


@operator("pow")
def power(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y)


@operator("maximum")
def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@operator("minimum")
def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


@operator("equal")
def equal(x: Tensor, y: Tensor) -> Tensor:
    return x == y


@operator("not_equal")
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    return x != y


@operator("greater")
def greater(x: Tensor, y: Tensor) -> Tensor:
    return x > y


@operator("greater_equal")
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    return x >= y


@operator("less")
def less(x: Tensor, y: Tensor) -> Tensor:
    return x < y


@operator("less_equal")
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    return x <= y


@operator("logical_and")
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_and(x, y)


@operator("logical_or")
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_or(x, y)


@operator("logical_xor")
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_xor(x, y)


@operator("logical_not")
def logical_not(x: Tensor) -> Tensor:
    return torch.logical_not(x)


@operator("abs", moves=True)
def absolute(x: Tensor) -> Tensor:
    return x.abs()


@operator("acos")
def acos(x: Tensor) -> Tensor:
    return x.acos()


@operator("asin")
def asin(x: Tensor) -> Tensor:
    return x.asin()


@operator("atan")
def atan(x: Tensor) -> Tensor:
    return x.atan()


@operator("atanh")
def atanh(x: Tensor) -> Tensor:
    return x.atanh()


@operator("ceil")
def ceil(x: Tensor) -> Tensor:
    return x.ceil()


@operator("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@operator("cos")
def cos(x: Tensor) -> Tensor:
    return x.cos()


@operator("cosh")
def cosh(x: Tensor) -> Tensor:
    return x.cosh()


@operator("erf")
def erf(x: Tensor) -> Tensor:
    return x.erf()


@operator("exp")
def exp(x: Tensor) -> Tensor:
    return x.exp()


@operator("exp2")
def exp2(x: Tensor) -> Tensor:
    return x.exp2()


@operator("floor")
def floor(x: Tensor) -> Tensor:
    return x.floor()


@operator("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return (x + epsilon).reciprocal()


@operator("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return (x + epsilon).log()


@operator("round")
def round_(x: Tensor) -> Tensor:
    return x.round()


@operator("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return (x + epsilon).rsqrt()


@operator("sign")
def sign(x: Tensor) -> Tensor:
    return x.sign()


@operator("sin")
def sin(x: Tensor) -> Tensor:
    return x.sin()


@operator("sinh")
def sinh(x: Tensor) -> Tensor:
    return x.sinh()


@operator("sqrt")
def sqrt(x: Tensor) -> Tensor:
    # torch's float32 square root is not rounded correctly on every CPU, its float64 one rounded to float32 is.
    return x.double().sqrt().to(x.dtype)


@operator("square")
def square(x: Tensor) -> Tensor:
    return x.square()


@operator("tan")
def tan(x: Tensor) -> Tensor:
    return x.tan()


@operator("tanh")
def tanh(x: Tensor) -> Tensor:
    return x.tanh()


@operator("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


@operator("identity", moves=True)
def identity(x: Tensor) -> Tensor:
    return x


@operator("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    """To integers, floats are cut towards zero. What the type cannot hold is not defined."""
    kind = DTYPES[ALIASES.get(dtype, dtype)]
    if kind.is_float or kind.name == "bool":
        return x.to(held_as(kind, native=x.dtype == torch.float16))
    if x.is_floating_point():
        x = x.trunc()
    return x.to(held_as(kind))


@operator("select", moves=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where ``cond`` holds, ``b`` elsewhere."""
    return torch.where(cond.bool(), a, b)
