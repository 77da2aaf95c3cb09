"""``${NAME}`` in recipes: replaced where it is declared, refused where it is not, and recorded as what it stood for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import RecipeError
from toolchain.formats.environment import Variables, escaped
from toolchain.formats.recipe_file import load_recipe, recipe_source


@pytest.fixture
def recipe(tmp_path: Path, recipe_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a recipe with some keys changed; returns its path."""
    for name in ("WEIGHTS", "OWN"):
        monkeypatch.delenv(name, raising=False)

    def write(file: str = "r.yaml", **changes: Any) -> Path:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(recipe_data | changes))
        return path

    return write


def complaint(path: Path) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_declared_is_replaced(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loras = ["${WEIGHTS}/a", {"checkpoint": "${WEIGHTS}/${OWN}"}]
    transformer = {"checkpoint": "${WEIGHTS}/base", "loras": loras}
    path = recipe(
        env={"WEIGHTS": "/w", "OWN": None}, transformer=transformer, name="$${OWN} $OWN ${}", sampler={"steps": 3}
    )
    monkeypatch.setenv("OWN", "b")
    found = load_recipe(path)
    assert found.name == "${OWN} $OWN ${}"
    assert found.transformer.checkpoint == "/w/base"
    assert [lora.checkpoint for lora in found.transformer.loras] == ["/w/a", "/w/b"]
    assert recipe_source(path).variables == {"WEIGHTS": "/w", "OWN": "b"}
    monkeypatch.setenv("WEIGHTS", "/other")
    assert load_recipe(path).transformer.checkpoint == "/other/base"


def test_what_is_recorded_is_read_back(recipe: Any, tmp_path: Path) -> None:
    found = load_recipe(recipe(env={"OWN": "a"}, name="${OWN} $${OWN} $$${OWN}"))
    assert found.name == "a ${OWN} $${OWN}"
    (tmp_path / "again.yaml").write_text(found.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == found


@given(st.text("${}AB_", max_size=30))
def test_escaped_texts_come_back(text: str) -> None:
    data = {"a": [text, 1], "b": {"c": text}}
    assert Variables({}, {}).replaced(escaped(data), Path("r.yaml")) == data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "${OWN}"},
            "name: '${OWN}' is not declared; declare it, as env: {OWN: null}, or write '$${OWN}' for the text itself",
        ),
        ({"transformer": {"checkpoint": "c", "passes": ["${OWN}"]}}, "transformer.passes.0: '${OWN}' is not declared"),
        ({"env": {"OWN": None}, "name": "${OWN}"}, "name: $OWN is not set, and env.OWN gives no default; set it, or"),
        ({"env": ["OWN"]}, "env: expected names with their defaults"),
        ({"env": {"OWN": 3}}, "env.OWN: expected a text or null, got 3; put it in quotes"),
        ({"env": {"O-N": "a"}}, "env.O-N: is no name of an environment variable"),
        ({"env": {3: "a"}}, "env.3: is no name"),
    ],
    ids=str,
)
def test_refused(recipe: Any, changes: dict[str, Any], message: str) -> None:
    path = recipe(**changes)
    assert complaint(path).startswith(f"{path}: {message}")


def test_what_is_declared_and_not_used_need_not_be_set(recipe: Any) -> None:
    assert load_recipe(recipe(env={"OWN": None})).name == "small"


def test_declared_in_what_is_extended(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("shared/base.yaml", env={"WEIGHTS": "weights", "OWN": "x"}, transformer={"checkpoint": "${WEIGHTS}/a"})
    child = tmp_path / "child.yaml"
    child.write_text("extends: shared/base.yaml\nenv: {OWN: y}\nname: ${OWN}\n")
    found = load_recipe(child)
    assert (found.name, found.transformer.checkpoint) == ("y", "shared/weights/a")
    monkeypatch.setenv("WEIGHTS", "/abs")
    assert load_recipe(child).transformer.checkpoint == "/abs/a"
    child.write_text("extends: shared/base.yaml\nenv: {WEIGHTS: null}\n")
    monkeypatch.delenv("WEIGHTS")
    assert "shared/base.yaml: transformer.checkpoint: $WEIGHTS is not set" in complaint(child)
