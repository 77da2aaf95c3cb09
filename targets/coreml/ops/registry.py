"""Operators of an ML program as functions on torch tensors.

An operator's function has the operator's own parameter names. Parameters annotated with ``Tensor`` are
given tensors; all others are given Python values (numbers, strings, lists of them).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Parameter:
    """A parameter of an operator: whether it must be given, takes tensors, and takes several of them."""

    required: bool
    tensor: bool
    several: bool


@dataclass(frozen=True)
class Operator:
    """What runs an operator, and what it takes. ``rounds``: whether it computes values that were not there."""

    call: Callable[..., Any]
    parameters: dict[str, Parameter]
    rounds: bool


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, moves: bool = False) -> Callable[[F], F]:
    """Register a function as the operators ``names``.

    Args:
        moves: it only moves values that it was given, which need no rounding.
    """

    def register(function: F) -> F:
        for name in names:
            OPERATORS[name] = described(function, moves)
        return function

    return register


def described(function: Callable[..., Any], moves: bool = False) -> Operator:
    """A function as an operator."""
    parameters = {}
    for name, p in inspect.signature(function).parameters.items():
        kind = str(p.annotation)
        parameters[name] = Parameter(p.default is p.empty, "Tensor" in kind, "Sequence[Tensor]" in kind)
    return Operator(function, parameters, rounds=not moves)
