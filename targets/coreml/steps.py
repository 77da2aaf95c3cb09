"""An operation of a program, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from targets.coreml.ops import Operator
from targets.coreml.program import Operation, Ref
from targets.coreml.values import Constant

Bound = Ref | Constant


@dataclass(frozen=True)
class Step:
    """An operation, ready to run. ``done``: the values that nothing needs after it."""

    operation: Operation
    operator: Operator
    arguments: Mapping[str, Bound | tuple[Bound, ...]]
    done: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that it is given, in the order of its parameters."""
        several = (a if isinstance(a, tuple) else (a,) for a in self.arguments.values())
        return tuple(a.name for group in several for a in group if isinstance(a, Ref))
