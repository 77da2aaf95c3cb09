"""Many builds in one file: recipes times the points of axes, each point some keys of the recipe."""

from __future__ import annotations

import copy
import difflib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe, Strict
from toolchain.formats.recipe_file import find_recipe, parse_recipe, recipe_source, set_key
from toolchain.formats.yaml_text import read_yaml
from toolchain.validation import explain

RECIPE_AXIS = "recipe"
"""What ``out`` and ``exclude`` call the choice of a recipe."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""Of an axis or a point: may stand in the name of a folder."""
Point = dict[str, Any]
"""Keys of the recipe, as ``--set`` has them, with their values."""


class Matrix(Strict):
    """Builds to make together. See ``sora-compile schema matrix``."""

    version: Literal[1] = 1
    recipes: list[str] = Field(
        min_length=1, description="Paths, looked for beside this file first, or names of shipped recipes."
    )
    axes: dict[Name, dict[Name, Point]] = Field(
        default_factory=dict,
        description="Axis, point, and the keys of the recipe that it sets: sampler.steps: 20. Later axes come last.",
    )
    exclude: list[dict[str, str]] = Field(
        default_factory=list,
        description="Builds to leave out, by axis and point; 'recipe' is an axis. Those that are not named are any.",
    )
    out: str = Field(
        min_length=1, description="The bundles' folders, such as 'build/{recipe}-{device}', one for each build."
    )

    @property
    def choices(self) -> dict[str, list[str]]:
        """The points of every axis, the recipes first."""
        return {RECIPE_AXIS: [recipe_name(r) for r in self.recipes], **{a: list(p) for a, p in self.axes.items()}}

    @model_validator(mode="after")
    def _fits(self) -> Matrix:
        if RECIPE_AXIS in self.axes:
            raise ValueError(f"axes.{RECIPE_AXIS}: is what the recipes are called; give the axis another name")
        if empty := next((axis for axis, points in self.axes.items() if not points), None):
            raise ValueError(f"axes.{empty}: has no points, so nothing would be built")
        names = self.choices[RECIPE_AXIS]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"recipes: two are called '{twice}'; rename a file")
        for i, left_out in enumerate(self.exclude):
            for axis, point in left_out.items():
                _known(axis, self.choices, f"exclude.{i}", "axis")
                _known(point, self.choices[axis], f"exclude.{i}.{axis}", "point")
        for field in _fields(self.out):
            _known(field, self.choices, "out", "axis")
        self._check_keys()
        return self

    def _check_keys(self) -> None:
        """Refuse a key that two axes set: which of them it has would hang on their order alone."""
        first: dict[str, str] = {}
        for axis, points in self.axes.items():
            for key in dict.fromkeys(key for point in points.values() for key in point):
                if key in first:
                    raise ValueError(f"axes.{axis}: sets '{key}', as axis '{first[key]}' does; set it in one of them")
                first[key] = axis


@dataclass(frozen=True)
class MatrixBuild:
    """One build of a matrix. ``name`` is its folder as the matrix writes it."""

    name: str
    recipe: Recipe
    base: Path
    """Folder that relative paths are looked for in first: the recipe's, or the matrix's for a shipped one."""
    out: Path
    choices: Mapping[str, str]


def load_matrix(path: str | Path, changes: Mapping[str, Any] | None = None) -> list[MatrixBuild]:
    """The builds of a matrix's file: recipes in order, the last axis fastest.

    Args:
        changes: keys that are set in every recipe, after those of the axes.

    Raises:
        RecipeError: names the matrix's key, or the build and the recipe's key, what is wrong and what was meant.
    """
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected keys and values; see 'sora-compile schema matrix'")
    try:
        matrix = Matrix.model_validate(data)
    except ValidationError as e:
        raise RecipeError(f"{path}: {explain(e, Matrix)}") from e
    builds = list(_builds(matrix, path, changes or {}))
    if not builds:
        raise RecipeError(f"{path}: exclude: leaves nothing to build")
    return builds


def recipe_name(recipe: str) -> str:
    """What a recipe of a matrix is called: its file's name without the suffix."""
    return Path(recipe).name.removesuffix(".yaml")


def _builds(matrix: Matrix, path: Path, changes: Mapping[str, Any]) -> Iterator[MatrixBuild]:
    recipes = {recipe_name(name): _recipe(name, path) for name in matrix.recipes}
    places: dict[Path, str] = {}
    for picked in itertools.product(*matrix.choices.values()):
        choices = dict(zip(matrix.choices, picked, strict=True))
        if any(all(choices[a] == p for a, p in left_out.items()) for left_out in matrix.exclude):
            continue
        out = Path(matrix.out.format(**choices))
        _check_place(out, ", ".join(f"{a} {p}" for a, p in choices.items()), places, path)
        base, data = recipes[choices[RECIPE_AXIS]]
        yield MatrixBuild(str(out), _changed(data, choices, matrix, path, str(out), changes), base, out, choices)


def _recipe(name: str, matrix: Path) -> tuple[Path, dict[str, Any]]:
    """A recipe's base and what it says."""
    beside = matrix.parent / name
    try:
        found = find_recipe(beside if beside.is_file() else name)
        shipped = found not in (beside, Path(name))
        return matrix.parent if shipped else found.parent, recipe_source(found).data
    except RecipeError as e:
        raise RecipeError(f"{matrix}: recipes: {e}") from e


def _changed(
    data: dict[str, Any], choices: Mapping[str, str], matrix: Matrix, path: Path, name: str, changes: Mapping[str, Any]
) -> Recipe:
    own = copy.deepcopy(data)
    for axis, points in matrix.axes.items():
        for key, value in points[choices[axis]].items():
            set_key(own, key, copy.deepcopy(value), f"{path}: axes.{axis}.{choices[axis]}.{key}")
    for key, value in changes.items():
        set_key(own, key, value, key)
    try:
        return parse_recipe(own)
    except RecipeError as e:
        raise RecipeError(f"{path}: {name}: {e}") from e


def _check_place(out: Path, build: str, places: dict[Path, str], path: Path) -> None:
    """Refuse a folder that another build writes; note it otherwise. None lies within another: all are as deep."""
    whole = Path(os.path.abspath(out))
    if whole in places:
        raise RecipeError(f"{path}: out: '{out}' is of two builds ({places[whole]}; {build}); name every axis in it")
    places[whole] = build


def _fields(out: str) -> Iterator[str]:
    """Names in braces.

    Raises:
        ValueError: braces that do not match, or more than a name in them.
    """
    try:
        parsed = list(Formatter().parse(out))
    except ValueError as e:
        raise ValueError(f"out: {e}") from e
    for _, field, form, conversion in parsed:
        if field is not None:
            if form or conversion:
                raise ValueError(f"out: expected the name of an axis alone in '{{{field}…}}'")
            yield field


def _known(name: str, known: Iterable[str], where: str, what: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
        raise ValueError(f"{where}: no {what} is called '{name}'; {hint}")
