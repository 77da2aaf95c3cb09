"""Finds model families, passes and targets by name, through entry points, importing only the one asked for."""

from __future__ import annotations

import contextlib
import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from toolchain.errors import RecipeError
from toolchain.validation import explain

PASSES = "sora_compile.passes"
TARGETS = "sora_compile.targets"
MODELS = "sora_compile.models"


def names(group: str) -> list[str]:
    """Names that are registered in an entry-point group."""
    return sorted({e.name for e in entry_points(group=group)})


def find(group: str, name: str, what: str, key: str) -> Any:
    """The class that is registered as ``name``; ``key`` is where the recipe names it.

    Raises:
        RecipeError: there is none; names the nearest ``what``. Or it cannot be imported.
    """
    entry = registered(group, name, what, key)
    try:
        return entry.load()
    except ImportError as e:
        raise RecipeError(f"{key}: {what} '{name}' ({entry.value}) cannot be imported: {e}") from e


def registered(group: str, name: str, what: str, key: str) -> EntryPoint:
    """As :func:`find`, not yet imported.

    Raises:
        RecipeError: there is none; names the nearest ``what``.
    """
    for entry in entry_points(group=group, name=name):
        return entry
    known = names(group)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
    raise RecipeError(f"{key}: no {what} is called '{name}'; {hint}")


def importable(group: str) -> dict[str, Any]:
    """All that is registered in a group and can be imported, by name; whoever names what cannot is told why."""
    found = {}
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        with contextlib.suppress(Exception):
            found[entry.name] = entry.load()
    return found


def configured(cls: Any, options: dict[str, Any], key: str) -> Any:
    """An object of a class that has a ``Config``, with validated options.

    Raises:
        RecipeError: an option is unknown or wrong; names it below ``key``.
    """
    config: type[BaseModel] = cls.Config
    try:
        return cls(config.model_validate(options))
    except ValidationError as e:
        raise RecipeError(explain(e, config, key)) from e
