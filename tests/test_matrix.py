"""A matrix of builds as a file: what it becomes, and every way in which it can be wrong, said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import RECIPE

from toolchain.errors import RecipeError
from toolchain.formats.matrix import Matrix, load_matrix

GOOD: dict[str, Any] = {
    "recipes": ["small.yaml", "tiny"],
    "axes": {
        "checkpoint": {"base": {}, "anime": {"transformer.checkpoint": "anime"}},
        "device": {"iphone": {"target": "coreml", "device": "iphone-15-pro"}, "any": {"sampler.guidance": 9.0}},
    },
    "exclude": [{"recipe": "tiny", "device": "iphone"}, {"checkpoint": "anime", "device": "any"}],
    "out": "build/{recipe}-{checkpoint}-{device}",
}


def written(folder: Path, **changes: Any) -> Path:
    """A matrix's file beside a recipe; None leaves a key out."""
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    data = {k: v for k, v in (GOOD | changes).items() if v is not None}
    (folder / "m.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return folder / "m.yaml"


def test_recipes_times_axes(tmp_path: Path) -> None:
    builds = load_matrix(written(tmp_path), {"gate.mode": "none"})
    assert [b.name for b in builds] == [
        "build/small-base-iphone",
        "build/small-base-any",
        "build/small-anime-iphone",
        "build/tiny-base-any",
    ]
    first, second, third, fourth = builds
    assert (first.recipe.target.name, first.recipe.device) == ("coreml", "iphone-15-pro")
    assert (second.recipe.target.name, second.recipe.sampler.guidance) == ("onnx", 9.0)
    assert third.recipe.transformer.checkpoint == "anime"
    assert third.choices == {"recipe": "small", "checkpoint": "anime", "device": "iphone"}
    assert {b.recipe.gate.mode for b in builds} == {"none"}
    assert {b.base for b in builds} == {tmp_path}
    assert fourth.recipe.name == "tiny"


def test_recipes_alone(tmp_path: Path) -> None:
    builds = load_matrix(written(tmp_path, axes=None, exclude=None, out="b/{recipe}"))
    assert [b.name for b in builds] == ["b/small", "b/tiny"]


def test_a_recipe_elsewhere_keeps_its_base(tmp_path: Path) -> None:
    path = written(tmp_path, recipes=["sub/other.yaml"], exclude=None)
    (tmp_path / "sub").mkdir()
    (tmp_path / "small.yaml").rename(tmp_path / "sub/other.yaml")
    assert {b.base for b in load_matrix(path)} == {tmp_path / "sub"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": ["tiny"]}, "recipe: unknown key; did you mean 'recipes'?"),
        (
            {"recipes": ["tinny"], "exclude": []},
            "recipes: recipe 'tinny' is neither a file nor a shipped recipe; did you mean 'tiny'?",
        ),
        ({"recipes": ["tiny", "./tiny.yaml"]}, "recipes: two are called 'tiny'; rename a file"),
        ({"recipes": []}, "recipes: list should have at least 1 item"),
        ({"axes": {"recipe": {"a": {}}}}, "axes.recipe: is what the recipes are called"),
        ({"axes": {"device": {}}}, "axes.device: has no points"),
        ({"axes": {"a/b": {"x": {}}}}, "axes.a/b"),
        ({"exclude": [{"devise": "any"}]}, "exclude.0: no axis is called 'devise'; did you mean 'device'?"),
        ({"exclude": [{"device": "ipone"}]}, "exclude.0.device: no point is called 'ipone'; did you mean 'iphone'?"),
        ({"exclude": [{"recipe": "small"}, {"recipe": "tiny"}]}, "exclude: leaves nothing to build"),
        ({"out": "build/{checkpint}"}, "out: no axis is called 'checkpint'; did you mean 'checkpoint'?"),
        ({"out": "build/{recipe"}, "out: expected '}' before end of string"),
        ({"out": "build/{recipe!r}"}, "out: expected the name of an axis alone in '{recipe…}'"),
        ({"out": "build/{recipe}-{device}", "exclude": []}, "is of two builds (recipe small, checkpoint base, device"),
        ({"out": "build/{recipe}/../{checkpoint}-{device}"}, "'build/tiny/../base-any' is of two builds"),
        (
            {"axes": {"a": {"x": {}, "y": {"device": "d"}}, "b": {"z": {"device": "e"}}}},
            "axes.b: sets 'device', as axis 'a' does",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    if "axes" in changes:
        changes = {"exclude": None, "out": "build"} | changes
    with pytest.raises(RecipeError) as caught:
        load_matrix(written(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path}/m.yaml: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ({"sampler.stepz": 3}, "m.yaml: b/small-x: sampler.stepz: unknown key; did you mean 'steps'?"),
        ({"transformer.passes.7": "partition"}, "m.yaml: axes.a.x.transformer.passes.7: '7' is not an index"),
        ({"name.first": "n"}, "m.yaml: axes.a.x.name.first: 'name' has no keys in it"),
    ],
)
def test_keys_of_a_recipe(tmp_path: Path, point: dict[str, Any], says: str) -> None:
    path = written(tmp_path, recipes=["small.yaml"], axes={"a": {"x": point}}, exclude=None, out="b/{recipe}-{a}")
    with pytest.raises(RecipeError) as caught:
        load_matrix(path)
    assert says in str(caught.value)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 3), max_size=3))
def test_as_many_builds_as_choices(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    axes = {f"axis{i}": {f"p{j}": {} for j in range(n)} for i, n in enumerate(sizes)}
    out = "-".join(["{recipe}", *(f"{{{axis}}}" for axis in axes)])
    folder = tmp_path_factory.mktemp("matrix")
    builds = load_matrix(written(folder, recipes=["small.yaml"], axes=axes, exclude=None, out=out))
    expected = 1
    for n in sizes:
        expected *= n
    assert len({b.out for b in builds}) == len(builds) == expected


def test_what_is_no_matrix(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("- a")
    with pytest.raises(RecipeError, match=r"m.yaml: expected keys and values; see 'sora-compile schema matrix'"):
        load_matrix(tmp_path / "m.yaml")
    with pytest.raises(RecipeError, match=r"none.yaml: cannot be read"):
        load_matrix(tmp_path / "none.yaml")
    assert Matrix.model_json_schema()["title"] == "Matrix"


def test_the_example() -> None:
    builds = load_matrix(Path(__file__).parents[1] / "examples/matrix.yaml")
    assert [b.recipe.target.name for b in builds] == ["coreml", "onnx"] * 2
