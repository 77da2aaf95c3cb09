"""Operators of ML programs, by name."""

from targets.coreml.ops import (  # noqa: F401  registered by being imported
    activations,
    compressed,
    elementwise,
    images,
    indexing,
    norms,
    products,
    reductions,
    shapes,
)
from targets.coreml.ops.registry import OPERATORS, Operator, Parameter

__all__ = ["OPERATORS", "Operator", "Parameter"]
