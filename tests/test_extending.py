"""Recipes that extend others: what is laid over what, where paths are looked for, and which file an error names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import contents, write_project

from toolchain.errors import RecipeError
from toolchain.formats.matrix import load_matrix
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import load_recipe, parse_recipe


def written(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def base(tmp_path: Path, recipe_data: dict[str, Any]) -> Path:
    return written(tmp_path / "base.yaml", recipe_data)


UNLIMITED: dict[str, Any] = {"gate": {"max_relative_error": {}}}
COREML = {"name": "coreml", "precision": "float32"}


@pytest.mark.parametrize(
    ("over", "changes"),
    [
        ({}, {}),
        ({"name": "mine"}, {"name": "mine"}),
        ({"sampler": {"steps": 9}}, {"sampler": {"steps": 9, "leap": 3, "merged_steps": 2}}),
        ({"sampler": {"leap": None}}, {"sampler": {"steps": 6, "merged_steps": 2}}),
        ({"sampler": None}, {"sampler": {}}),
        ({"transformer": {"passes": []}}, {"transformer": {"checkpoint": "checkpoint", "passes": []}}),
        ({"target": COREML}, {"target": COREML}),
        ({"memory_budget": None, "gate": {"golden": None, "max_relative_error": {"int8": None}}}, UNLIMITED),
        ({"gate": {"max_relative_error": {"float32": 0.5}}}, {"gate": {"max_relative_error": {"float32": 0.5}}}),
    ],
    ids=str,
)
def test_laid_over(base: Path, recipe_data: dict[str, Any], over: dict[str, Any], changes: dict[str, Any]) -> None:
    child = written(base.parent / "child.yaml", {"extends": "base.yaml", **over})
    assert load_recipe(child) == parse_recipe(recipe_data | changes)


def test_null_is_a_value_where_it_is_one(tmp_path: Path, recipe_data: dict[str, Any]) -> None:
    encoder = {"checkpoint": "t5", "aesthetic_score": 5.0}
    written(tmp_path / "base.yaml", recipe_data | {"text_encoder": encoder})
    child = written(tmp_path / "child.yaml", {"extends": "base.yaml", "text_encoder": {"aesthetic_score": None}})
    found = load_recipe(child).text_encoder
    assert found is not None and found.aesthetic_score is None


def test_null_in_a_models_configuration_is_the_models(tmp_path: Path, recipe_data: dict[str, Any]) -> None:
    recipe_data["transformer"]["config"] = {"a": None, "b": {"c": None, "d": 1}}
    written(tmp_path / "base.yaml", recipe_data)
    child = written(tmp_path / "child.yaml", {"extends": "base.yaml", "transformer": {"config": {"b": {"d": None}}}})
    assert load_recipe(child).transformer.config == {"a": None, "b": {"c": None, "d": None}}
    target = {"target": {"name": "onnx", "precision": "float32"}}
    written(tmp_path / "base.yaml", recipe_data | target)
    child = written(tmp_path / "child.yaml", {"extends": "base.yaml", "target": {"precision": None}})
    assert load_recipe(child).target.options == {}


def test_a_component_can_be_taken_away(tmp_path: Path, recipe_data: dict[str, Any]) -> None:
    written(tmp_path / "base.yaml", recipe_data | {"vae": {"checkpoint": "vae"}})
    child = written(tmp_path / "child.yaml", {"extends": "base.yaml", "vae": None})
    assert load_recipe(child) == parse_recipe(recipe_data)


plain = st.recursive(
    st.integers(0, 3) | st.just([1]), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
configs = st.lists(st.dictionaries(st.sampled_from("abc"), plain, max_size=3), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(configs)
def test_a_chain_is_laid_one_by_one(tmp_path_factory: pytest.TempPathFactory, layers: list[dict[str, Any]]) -> None:
    """What is known of mappings: the last scalar wins, mappings join, whatever the depth."""

    def laid(over: Any, under: Any) -> Any:
        if not isinstance(over, dict) or not isinstance(under, dict):
            return over
        return {k: laid(over[k], under[k]) if k in over and k in under else (over | under)[k] for k in over | under}

    folder, expected = tmp_path_factory.mktemp("chain"), {}
    for i, config in enumerate(layers):
        extends = {"extends": f"{i - 1}.yaml"} if i else dict(MINIMAL)
        own = {"transformer": {"config": config} | ({} if i else {"checkpoint": "c"})}
        written(folder / f"{i}.yaml", extends | own)
        expected = laid(config, expected)
    assert load_recipe(folder / f"{len(layers) - 1}.yaml").transformer.config == expected


MINIMAL = {
    "name": "n",
    "model": "open-sora-v1.2",
    "video": {"frames": 17, "height": 32, "width": 48},
    "target": "onnx",
}


def test_paths_are_beside_the_file_that_says_them(tmp_path: Path, recipe_data: dict[str, Any]) -> None:
    recipe_data["transformer"]["loras"] = ["a.safetensors", {"checkpoint": "hf://me/it", "weight": 0.5}]
    recipe_data |= {"device": "mine.yaml", "vae": {"checkpoint": "/abs/vae#ema"}}
    recipe_data["text_encoder"] = {"checkpoint": "shipped://tiny/text_encoder", "tokenizer": "spiece.model"}
    written(tmp_path / "shared" / "deep" / "base.yaml", recipe_data)
    (tmp_path / "shared" / "deep" / "mine.yaml").write_text("")
    written(tmp_path / "shared" / "mid.yaml", {"extends": "deep/base.yaml", "transformer": {"checkpoint": "mid#ema"}})
    found = load_recipe(written(tmp_path / "own" / "r.yaml", {"extends": "../shared/mid.yaml", "name": "own"}))
    assert found.transformer.checkpoint == "../shared/mid#ema"
    assert [lora.checkpoint for lora in found.transformer.loras] == ["../shared/deep/a.safetensors", "hf://me/it"]
    assert found.device == "../shared/deep/mine.yaml"
    assert found.vae is not None and found.vae.checkpoint == "/abs/vae#ema"
    assert found.text_encoder is not None
    assert (found.text_encoder.checkpoint, found.text_encoder.tokenizer) == (
        "shipped://tiny/text_encoder",
        "spiece.model",
    )


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "shipped://tiny"])
def test_a_shipped_recipe(tmp_path: Path, name: str) -> None:
    assert load_recipe(written(tmp_path / "r.yaml", {"extends": name, "target": "onnx"})) == load_recipe(
        "tiny", ["target=onnx"]
    )


def test_a_matrix_of_them(base: Path) -> None:
    written(base.parent / "child.yaml", {"extends": "base.yaml", "sampler": {"steps": 9}})
    written(base.parent / "m.yaml", {"recipes": ["child.yaml"], "out": "b/{recipe}"})
    assert [b.recipe.sampler.steps for b in load_matrix(base.parent / "m.yaml")] == [9]


# --- what is refused ---------------------------------------------------------------------------------


def test_a_circle(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "b")):
        written(tmp_path / f"{name}.yaml", {"extends": f"{other}.yaml"})
    a, b, c = (tmp_path / f"{n}.yaml" for n in "abc")
    assert complaint(a) == f"{c}: extends: goes in a circle: {a} → {b} → {c} → {b}"
    assert "circle" in complaint(written(tmp_path / "tiny.yaml", {"extends": "tiny.yaml"}))


def test_a_long_chain(base: Path, recipe_data: dict[str, Any]) -> None:
    folder = base.parent
    for i in range(8):
        written(folder / f"{i}.yaml", {"extends": f"{i - 1}.yaml" if i else "base.yaml"})
    assert load_recipe(folder / "6.yaml") == parse_recipe(recipe_data)
    text = complaint(folder / "7.yaml")
    assert text.startswith(f"{folder / '0.yaml'}: extends: more than 8 recipes in a chain: {folder / '7.yaml'} → ")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"extends": 3}, "child.yaml: extends: expected a recipe's path"),
        ({"extends": "bsae.yaml"}, "child.yaml: extends: 'bsae.yaml' is neither a file beside it nor a shipped recipe"),
        ({"extends": "tinny"}, "nor a shipped recipe; did you mean 'tiny'?"),
        ({"sampler": {"stepz": 3}}, "child.yaml: sampler.stepz: unknown key; did you mean 'steps'?"),
        ({"sampler": {"steps": "x"}}, "child.yaml: sampler.steps: input should be a valid integer, got str 'x'"),
        ({"sampler": {"merged_steps": 7}}, "child.yaml: sampler: merged_steps 7 is more than steps 6"),
        ({"transformer": {"checkpoint": None}}, "child.yaml: transformer.checkpoint: field required"),
        ({"transformer": {"loras": [{"weigth": 1}]}}, "child.yaml: transformer.loras.0.weigth: unknown key"),
        ({"target": {"precision": "float32"}}, "child.yaml: target: expected a target's name"),
        ({"model": "nope"}, "child.yaml: model: no model is called 'nope'"),
    ],
    ids=str,
)
def test_errors_name_the_file_that_said_it(base: Path, over: dict[str, Any], message: str) -> None:
    child = written(base.parent / "child.yaml", {"extends": "base.yaml"} | over)
    assert message in complaint(child)


def test_errors_of_what_is_extended_name_that(base: Path, recipe_data: dict[str, Any]) -> None:
    child = written(base.parent / "child.yaml", {"extends": "base.yaml", "sampler": {"steps": 6}})
    bad = copy.deepcopy(recipe_data)
    bad["sampler"]["guidance"] = "much"
    written(base, bad)
    assert complaint(child).startswith(f"{base}: sampler.guidance: ")
    assert complaint(child, "sampler.guidance=more").startswith("sampler.guidance: ")
    base.write_text("a: [")
    assert complaint(child).startswith(f"{base}:1: not YAML")
    base.write_text("- a")
    assert complaint(child).startswith(f"{base}: expected keys and values")


# --- the same bytes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_bundle_as_of_a_flat_one(tmp_path: Path, run_cli: Any, one_pair: Any) -> None:
    project = write_project(tmp_path / "team", one_pair)
    extra = {"sampler": {"leap": None, "merged_steps": 1, "steps": 3}}
    written(tmp_path / "own" / "child.yaml", {"extends": "../team/recipe.yaml", **extra})
    data = yaml.safe_load((project / "recipe.yaml").read_text())
    flat = data | {"sampler": {"merged_steps": 1, "steps": 3}}
    flat["transformer"]["checkpoint"] = "../team/checkpoint"
    written(tmp_path / "own" / "flat.yaml", flat)
    assert run_cli("own/child.yaml", "-o", "b", "--no-gate", cwd=tmp_path).code == 0
    built = contents(tmp_path / "b")
    ran = run_cli("own/flat.yaml", "-o", "b", "--no-gate", cwd=tmp_path)
    assert (ran.code, "nothing has changed" in ran.err) == (0, True)  # the key is the same
    assert run_cli("own/flat.yaml", "-o", "c", "--no-gate", cwd=tmp_path).code == 0
    assert contents(tmp_path / "c") == built
    assert "extends" not in (tmp_path / "b" / "recipe.yaml").read_text()
    assert Recipe.model_validate(yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text()))
