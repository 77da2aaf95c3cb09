"""Finds passes and targets by name, through entry points, importing only the one asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from toolchain.errors import RecipeError
from toolchain.formats.manifest import Manifest
from toolchain.ir.passes import Pass
from toolchain.ir.target import Target
from toolchain.validation import explain

PASSES = "sora_compile.passes"
TARGETS = "sora_compile.targets"


def names(group: str) -> list[str]:
    """Names that are registered in an entry-point group."""
    return sorted({e.name for e in entry_points(group=group)})


def find_pass(name: str, options: dict[str, Any], key: str) -> Pass:
    """The pass called ``name`` with its options; ``key`` is where the recipe names it.

    Raises:
        RecipeError: there is no such pass, or its options are wrong.
    """
    cls, key = _load(PASSES, name, "pass", key), f"{key}.{name}"
    try:
        return cls(cls.Config.read(options))  # type: ignore[no-any-return]
    except ValidationError as e:
        raise RecipeError(explain(e, cls.Config, key)) from e
    except ValueError as e:
        raise RecipeError(f"{key}: {e}") from e


def passes_providing(function: str) -> list[str]:
    """Names of the installed passes that add ``function`` to a graph."""
    return sorted(e.name for e in entry_points(group=PASSES) if function in _provides(e))


def _provides(entry: EntryPoint) -> tuple[str, ...]:
    try:
        return tuple(entry.load().provides)
    except Exception:  # a plugin that is broken offers nothing; whoever names it is told why
        return ()


def find_target(name: str, options: dict[str, Any], key: str = "target") -> Target:
    """The target called ``name`` with its options.

    Raises:
        RecipeError: there is no such target, or its options are wrong.
    """
    cls = _load(TARGETS, name, "target", key)
    return cls(_config(cls.Config, options, key))  # type: ignore[no-any-return]


def target_of(manifest: Manifest, component: str) -> Target:
    """The target of a component of a bundle, with its options.

    Raises:
        RecipeError: as :func:`find_target`.
    """
    options = manifest.target.options | {"precision": manifest.components[component].precision}
    return find_target(manifest.target.name, options)


def _load(group: str, name: str, what: str, key: str) -> Any:
    found: Iterable[EntryPoint] = entry_points(group=group, name=name)
    for entry in found:
        return entry.load()
    known = names(group)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
    raise RecipeError(f"{key}: no {what} is called '{name}'; {hint}")


def _config(cls: type[BaseModel], options: dict[str, Any], key: str) -> Any:
    try:
        return cls.model_validate(options)
    except ValidationError as e:
        raise RecipeError(explain(e, cls, key)) from e
