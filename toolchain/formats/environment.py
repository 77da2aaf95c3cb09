"""``${NAME}`` in a recipe's texts: values from the environment, of those names alone that its ``env`` declares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.errors import RecipeError

ENV = "env"
"""The key that declares names, with what they are where the environment has them not; null for nothing."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USE = re.compile(rf"\$(\$?)\{{({_NAME.pattern})\}}")


def declared(data: Mapping[str, Any], path: Path) -> dict[str, str | None]:
    """What a recipe's file declares, by name: the default, or None.

    Raises:
        RecipeError: ``env`` is not a mapping of names to texts or null.
    """
    given = data.get(ENV, {})
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: {ENV}: expected names with their defaults, as {ENV}: {{CHECKPOINTS: null}}")
    for name, default in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RecipeError(f"{path}: {ENV}.{name}: is no name of an environment variable; use letters, digits, _")
        if default is not None and not isinstance(default, str):
            raise RecipeError(f"{path}: {ENV}.{name}: expected a text or null, got {default!r}; put it in quotes")
    return dict(given)


@dataclass
class Variables:
    """The names that may be used, with their defaults; notes which were, with their values."""

    defaults: Mapping[str, str | None]
    environment: Mapping[str, str]
    used: dict[str, str] = field(default_factory=dict)

    def replaced(self, value: Any, path: Path, key: str = "") -> Any:
        """A recipe's data, or a part of it, with every ``${NAME}`` in its texts replaced; ``$${NAME}`` stays as a text.

        Args:
            path, key: where it is written, for errors.

        Raises:
            RecipeError: a name is not declared, or has neither a value nor a default.
        """
        if isinstance(value, dict):
            return {k: self.replaced(v, path, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self.replaced(v, path, f"{key}.{i}") for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        return _USE.sub(lambda found: found[0][1:] if found[1] else self._value(found[2], f"{path}: {key}"), value)

    def _value(self, name: str, where: str) -> str:
        if name not in self.defaults:
            raise RecipeError(
                f"{where}: '${{{name}}}' is not declared; declare it, as {ENV}: {{{name}: null}}, or write "
                f"'$${{{name}}}' for the text itself"
            )
        value = self.environment.get(name, self.defaults[name])
        if value is None:
            raise RecipeError(f"{where}: ${name} is not set, and {ENV}.{name} gives no default; set it, or give one")
        self.used[name] = value
        return value


def escaped(value: Any) -> Any:
    """Data that comes back as it is when it is read as a recipe that declares nothing."""
    if isinstance(value, dict):
        return {k: escaped(v) for k, v in value.items()}
    if isinstance(value, list):
        return [escaped(v) for v in value]
    return _USE.sub(lambda found: f"${found[0]}", value) if isinstance(value, str) else value
