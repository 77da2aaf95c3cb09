"""Leaves, the modules that a graph's nodes call, and the legal forms that targets ask of them.

A model writes its leaves in plain form and knows no target. What a leaf lets others change is its *trait*,
a contract in :mod:`toolchain.ir.contracts`; a target registers :class:`LegalForm` objects, each for a kind
of leaf or for a trait, and :mod:`toolchain.ir.legalise` applies them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar, Self

from torch import nn

from toolchain.errors import LoweringError
from toolchain.ir.weights import WeightSource


class Leaf(nn.Module):
    """A module that capture does not look into.

    ``kind`` is what passes match on (``self_attention``, ``cross_attention``, …); it is the only thing
    that they know of a model. ``trait`` is set by the contracts that a leaf inherits from; a leaf has the
    traits of all of them.
    """

    kind: ClassVar[str] = ""
    trait: ClassVar[str] = ""
    delicate: ClassVar[bool] = False
    """Whether quantization leaves the leaf's weights alone unless a rule names them."""

    @property
    def output_scale(self) -> float:
        """What a legal form's output is multiplied with against the plain form's."""
        return 1.0

    def is_a(self, kind_or_trait: str) -> bool:
        """Whether the leaf is of a kind, or has a trait."""
        return kind_or_trait in (self.kind, *(vars(c).get("trait") for c in type(self).__mro__))

    def changed(self, **attributes: Any) -> Self:
        """A copy with other attributes or parts; it shares all else, weights included, with this leaf."""
        other = copy.copy(self)
        other._modules = dict(self._modules)  # torch's shallow copy shares the table of parts itself
        for name, value in attributes.items():
            setattr(other, name, value)
        return other


@dataclass(frozen=True)
class LegalLeaf:
    """A leaf's legal form, and where its parameters come from; sources name the plain leaf's parameters.

    ``sources`` is None for a form that shares the plain leaf's parameters. A leaf that is legal already is
    its own legal form: ``LegalLeaf(leaf)``.
    """

    leaf: Leaf
    sources: Mapping[str, WeightSource] | None = None


@dataclass(frozen=True)
class LegalForm:
    """A form that a target needs every leaf of one kind, or with one trait, to have.

    Args:
        name: how errors call the form.
        of: the kind or the trait.
        make: gives a leaf's legal form, which must compute what the leaf does. None says that the form does
            not know this leaf, which is an error, because the target cannot lower it then.
    """

    name: str
    of: str
    make: Callable[[Leaf], LegalLeaf | None] = field(repr=False)


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """A module's numbers, strings, tuples and functions: what distinguishes it besides its weights and parts.

    Functions are given by their full names.

    Raises:
        LoweringError: a function has no name of its own, so that two which differ could not be told apart.
    """
    plain = (bool, int, float, str, tuple)
    found: dict[str, object] = {}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, (FunctionType, BuiltinFunctionType)):
            found[name] = _full_name(value, f"{type(module).__name__}.{name}")
        elif isinstance(value, plain):
            found[name] = value
    return found


def _full_name(function: FunctionType | BuiltinFunctionType, place: str) -> str:
    full = f"{function.__module__}.{function.__qualname__}"
    if "<" in full:  # a lambda, or a function made within another one
        raise LoweringError(f"'{place}' is {full}: define it at the top of a module, so that its name says what it is")
    return full
