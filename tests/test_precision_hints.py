"""What an error tells a user to write is accepted when it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import RECIPE

import toolchain
from targets.coreml import CoreMLTarget
from toolchain.build.gate import gate_limit
from toolchain.errors import LoweringError, PrecisionError, RecipeError
from toolchain.formats.recipe_file import load_recipe, parse_recipe


@pytest.mark.slow
def test_a_weight_that_float16_cannot_hold(project: Path) -> None:
    path = project / "checkpoint/model.safetensors"
    weights = {k: v.clone() for k, v in load_file(path).items()}
    weights["final_layer.linear.bias"][3] = 1e5
    path.unlink()
    save_file(weights, path)
    overrides = ["target=coreml", "gate.mode=none"]
    with pytest.raises(LoweringError) as error:
        recipe = load_recipe(project / "recipe.yaml", overrides)
        toolchain.compile_recipe(recipe, project / "bundle", base=project)
    assert isinstance(error.value.__cause__, PrecisionError)
    said = re.fullmatch(
        r"block 'final': weight 'final_layer.linear.bias' reaches 1e.05, which float16 cannot hold; set (\S+): (\S+)",
        str(error.value),
    )
    assert said is not None, str(error.value)
    recipe = load_recipe(project / "recipe.yaml", [*overrides, f"{said[1]}={said[2]}"])
    bundle = toolchain.compile_recipe(recipe, project / "bundle", base=project)
    assert bundle.manifest.components["transformer"].precision == "float32"


def test_a_precision_without_a_limit() -> None:
    class Brain(CoreMLTarget):
        precision = "bfloat16"  # type: ignore[assignment]

    with pytest.raises(RecipeError) as error:
        gate_limit(parse_recipe(RECIPE), Brain().precision)
    said = re.search(r"gate\.max_relative_error: no limit for bfloat16; add '(\S+): (\S+)'", str(error.value))
    assert said is not None, str(error.value)
    limits: dict[str, Any] = {said[1]: float(said[2])}
    assert gate_limit(parse_recipe({**RECIPE, "gate": {"max_relative_error": limits}}), Brain().precision) == float(
        said[2]
    )
    with pytest.raises(RecipeError, match="no precision is called 'flaot16'; did you mean 'float16'"):
        parse_recipe({**RECIPE, "gate": {"max_relative_error": {"flaot16": 1e-3}}})
