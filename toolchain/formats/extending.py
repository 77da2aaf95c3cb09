"""Recipes that extend others: ``extends`` names one that is read first, and this one's keys are laid over it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import RecipeError
from toolchain.formats.environment import ENV, Variables, declared
from toolchain.formats.recipe import COMPONENTS, Recipe
from toolchain.formats.yaml_text import read_yaml
from toolchain.validation import takes_none, type_within

EXTENDS = "extends"
MAX_FILES = 8
"""Longest chain of recipes that extend each other."""
SHIPPED = "shipped://"
Key = tuple[str, ...]


@dataclass(frozen=True)
class RecipeSource:
    """What a recipe's files say together, as plain data, with nothing left to be looked up."""

    data: dict[str, Any]
    files: tuple[Path, ...]
    """The recipe's own file, then the one that it extends, and so on."""
    said_in: Mapping[Key, Path]
    """The file that has the last word on a key."""
    variables: Mapping[str, str]
    """The environment variables that texts use, with the values taken."""

    def file_of(self, key: Sequence[str]) -> Path | None:
        """The file that a key is from, or what is around it; None of a recipe that is one file."""
        if len(self.files) == 1:
            return None
        around = (tuple(key[:n]) for n in range(len(key), 0, -1))
        return next((self.said_in[k] for k in around if k in self.said_in), self.files[0])


def file_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe's file: a recipe's, with the keys that only files have."""
    schema = Recipe.model_json_schema()
    variable = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    schema["properties"] |= {
        EXTENDS: {
            "type": "string",
            "description": "A recipe that is read first: a path beside this file, or the name of a shipped one.",
        },
        ENV: {
            "type": "object",
            "additionalProperties": variable,
            "description": "Environment variables that texts may use as ${NAME}, with defaults; null for none.",
        },
    }
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": [EXTENDS]}]
    return schema


def read_source(path: Path, shipped: Mapping[str, Path]) -> RecipeSource:
    """Read a recipe's file and those that it extends.

    Args:
        shipped: recipes that can be extended by name.

    Raises:
        RecipeError: a file cannot be read, there is none, they go in a circle or are too many, or a text uses a
            variable that it may not; names file and key.
    """
    layers = list(_layers(path, shipped))
    defaults: dict[str, str | None] = {}
    for layer in reversed(layers):
        defaults |= declared(layer.data, layer.path)
    variables = Variables(defaults, os.environ)
    merged: dict[str, Any] = {}
    said_in: dict[Key, Path] = {}
    for layer in reversed(layers):
        own = {k: v for k, v in layer.data.items() if k not in (EXTENDS, ENV)}
        own = _located(variables.replaced(own, layer.path), layer)
        merged = _laid(own, merged, Recipe) if len(layers) > 1 else own
        said_in |= dict.fromkeys(_keys(own), layer.path)
    return RecipeSource(merged, tuple(layer.path for layer in layers), said_in, variables.used)


@dataclass(frozen=True)
class _Layer:
    path: Path
    data: dict[str, Any]
    folder: Path
    """Its folder as seen from that of the recipe which is built."""


def _layers(path: Path, shipped: Mapping[str, Path]) -> Iterator[_Layer]:
    """The recipe, then what it extends, and so on."""
    chain: list[Path] = []
    seen: set[Path] = set()
    folder = Path()
    while True:
        chain.append(path)
        shown = " → ".join(map(str, chain))
        if path.resolve() in seen:
            raise RecipeError(f"{chain[-2]}: {EXTENDS}: goes in a circle: {shown}")
        if len(chain) > MAX_FILES:
            raise RecipeError(f"{chain[-2]}: {EXTENDS}: more than {MAX_FILES} recipes in a chain: {shown}")
        seen.add(path.resolve())
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: expected keys and values; see 'sora-compile schema recipe'")
        yield _Layer(path, data, folder)
        if EXTENDS not in data:
            return
        path, folder = _extended(data[EXTENDS], path, folder, shipped)


def _extended(name: Any, path: Path, folder: Path, shipped: Mapping[str, Path]) -> tuple[Path, Path]:
    """The file that ``path`` extends, and its folder as seen from the first recipe's."""
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{path}: {EXTENDS}: expected a recipe's path, or the name of a shipped one")
    if (path.parent / name).is_file():
        return path.parent / name, folder / Path(name).parent
    found = shipped.get(name.removeprefix(SHIPPED).removesuffix(".yaml"))
    if found is not None:
        return found, found.parent
    close = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"shipped recipes: {', '.join(shipped)}"
    raise RecipeError(f"{path}: {EXTENDS}: '{name}' is neither a file beside it nor a shipped recipe; {hint}")


def _laid(over: Mapping[str, Any], under: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """One mapping laid over another: mappings key by key, anything else replaced, null takes a key away.

    Where null is one of a key's values, it is that.

    Args:
        kind: the type of what they are, as far as it is known.
    """
    merged = dict(under)
    for key, value in over.items():
        inner = type_within(kind, key)
        if value is None and not takes_none(inner):
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _laid(value, below if isinstance(below, dict) else {}, inner)
        else:
            merged[key] = value
    return merged


def _keys(data: Mapping[str, Any], around: Key = ()) -> Iterator[Key]:
    """Every key of nested mappings."""
    for name, value in data.items():
        yield (*around, str(name))
        if isinstance(value, dict):
            yield from _keys(value, (*around, str(name)))


def _located(data: dict[str, Any], layer: _Layer) -> dict[str, Any]:
    """A layer's data whose relative paths mean the same beside the recipe that is built."""
    if layer.folder == Path():
        return data
    moved = dict(data)
    for name in COMPONENTS:
        if isinstance(part := moved.get(name), dict):
            moved[name] = _located_part(part, layer)
    if isinstance(device := moved.get("device"), str):
        moved["device"] = _if_beside(device, layer)
    return moved


def _located_part(part: dict[str, Any], layer: _Layer) -> dict[str, Any]:
    moved = _with_checkpoint(part, layer)
    if isinstance(loras := part.get("loras"), list):
        moved["loras"] = [
            _with_checkpoint(each, layer) if isinstance(each, dict) else _moved(each, layer) for each in loras
        ]
    if isinstance(tokenizer := part.get("tokenizer"), str):
        moved["tokenizer"] = _if_beside(tokenizer, layer)
    return moved


def _with_checkpoint(part: dict[str, Any], layer: _Layer) -> dict[str, Any]:
    return part | {"checkpoint": _moved(part["checkpoint"], layer)} if "checkpoint" in part else dict(part)


def _moved(location: Any, layer: _Layer) -> Any:
    """A location of weights; those that are no relative paths stay, as does what is none at all."""
    if not isinstance(location, str) or "://" in location or Path(location).expanduser().is_absolute():
        return location
    return str(layer.folder / location)


def _if_beside(name: str, layer: _Layer) -> str:
    """What may be a path or a name: it is a path if the file that says it has such a file beside it."""
    return str(layer.folder / name) if (layer.path.parent / name).is_file() else name
