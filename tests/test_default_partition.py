"""A family says how its components are cut where a recipe lists no partition."""

from __future__ import annotations

from support import load_passes

from toolchain.formats.recipe_file import load_recipe


def test_the_family_says_how_a_component_is_cut() -> None:
    recipe = load_recipe("tiny")
    cuts = {name: str(load_passes(recipe, name).partition) for name in recipe.components()}
    assert cuts == {"text_encoder": "partition", "transformer": "partition", "vae": "partition{max_bytes=200MB}"}


def test_passes_that_rewrite_leave_the_familys_partition() -> None:
    recipe = load_recipe("tiny", ["vae.passes=partition{blocks=1}", "transformer.passes=token-merge"])
    assert str(load_passes(recipe, "vae")) == "partition{blocks=1}"
    assert str(load_passes(recipe, "transformer")) == "token-merge partition"
