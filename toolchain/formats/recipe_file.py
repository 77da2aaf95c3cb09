"""Recipes as files: found by path or shipped name, read, overridden key by key, validated."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from toolchain.errors import RecipeError
from toolchain.formats.extending import RecipeSource, read_source
from toolchain.formats.recipe import Recipe
from toolchain.formats.yaml_text import load_yaml
from toolchain.validation import explain, explained_key


def shipped() -> dict[str, Path]:
    """The recipes that come with this package, by name."""
    import recipes

    folder = Path(next(iter(recipes.__path__)))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The recipe file that a path or a shipped name means.

    Raises:
        RecipeError: there is none.
    """
    path = Path(name)
    known = shipped()
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml") if len(path.parts) == 1 else ""
    if stem in known:
        return known[stem]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"shipped recipes: {', '.join(known)}"
    raise RecipeError(f"recipe '{name}' is neither a file nor a shipped recipe; {hint}")


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe by path or shipped name, with ``a.b=value`` overrides applied.

    Raises:
        RecipeError: names the key, what is wrong with it, and the key that was meant where one is close.
    """
    return parse_source(recipe_source(find_recipe(name)), overrides)


def recipe_source(path: Path) -> RecipeSource:
    """What a recipe's file says, together with those that it extends. Raises as :func:`read_source`."""
    return read_source(path, shipped())


def parse_source(source: RecipeSource, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that files say, with ``a.b=value`` overrides applied.

    Raises:
        RecipeError: as :func:`load_recipe`; of several files it names the one at fault.
    """
    data, overrides = copy.deepcopy(source.data), list(overrides)
    for override in overrides:
        _override(data, override)
    overridden = [override.partition("=")[0].split(".") for override in overrides]

    def file_of(key: list[str]) -> Path | None:
        return None if any(key[: len(own)] == own for own in overridden) else source.file_of(key)

    return parse_recipe(data, file_of)


def parse_recipe(data: Mapping[str, Any], file_of: Callable[[list[str]], Path | None] = lambda _: None) -> Recipe:
    """A recipe from plain data, as YAML gives it.

    Args:
        file_of: the file that a key is from, to be named in errors.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        file = file_of(explained_key(e, Recipe))
        raise RecipeError((f"{file}: " if file is not None else "") + explain(e, Recipe)) from e


def _names_passes(key: str, text: str) -> bool:
    """Whether a value is a text of passes, which YAML could take for something else: ``a{x={b: 1}}``."""
    return key.split(".")[1:2] == ["passes"] and len(key.split(".")) <= 3 and text[:1] not in tuple("[{'\"")


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, such as sampler.steps=20")
    try:
        value = text if _names_passes(key, text) else load_yaml(text)
    except yaml.YAMLError as e:
        raise RecipeError(f"--set {override}: the value is not YAML") from e
    set_key(data, key, value, f"--set {override}")


def set_key(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a key of a recipe's plain data, such as ``sampler.steps`` or ``transformer.passes.0``.

    Args:
        where: who sets it, for errors.

    Raises:
        RecipeError: there is no such place in what the recipe has.
    """
    *parents, last = key.split(".")
    place: Any = data
    for i, part in enumerate(parents):
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise RecipeError(f"{where}: '{part}' is not an index into a list of {len(place)}")
            place = place[int(part)]
        elif isinstance(place, dict):
            if isinstance(place.get(part), str) and part == "target":
                place[part] = {"name": place[part]}
            place = place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise RecipeError(f"{where}: '{'.'.join(parents[: i + 1])}' has no keys in it")
    if isinstance(place, dict):
        place[last] = value
    elif last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise RecipeError(f"{where}: '{last}' is not an index into a list of {len(place)}")
