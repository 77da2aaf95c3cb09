"""What fuzzing found, and what is known to be tried: each is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from targets.executorch.engine import ExecuTorchEngine
from toolchain.errors import BundleError, CheckpointError, LoweringError, RecipeError
from toolchain.formats.recipe_file import load_recipe
from toolchain.formats.tensors import read_tensors
from toolchain.formats.yaml_text import read_yaml
from toolchain.weights.checkpoint import open_checkpoint, read_config

BOMB = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
)
RECIPES = {
    "aliases that expand": BOMB,
    "a part within itself": "a: &a [*a]",
    "a mapping within itself": "a: &a {b: *a}",
    "a number of too many digits": f"version: {'9' * 5000}",
    "a date that is none": "name: 2024-99-99",
    "deep lists": "[" * 50_000,
    "deep mappings": "{a: " * 50_000,
    "an integer that is none": "name: !!int x",
    "a float that is none": "name: !!float x",
    "bytes that are none": "name: !!binary _",
    "a merge of no mapping": "<<: 3",
    "code": "name: !!python/object/apply:os.system [x]",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES.keys())
def test_recipes(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["9" * 5000, "2024-99-99", "[" * 5000, "&a [*a]"], ids=["digits", "date", "deep", "loop"]
)
def test_overrides(text: str) -> None:
    with pytest.raises(RecipeError, match="the value is not YAML"):
        load_recipe("tiny", [f"sampler.steps={text}"])


def test_aliases_that_do_not_expand_much_are_read(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("a: &a {x: 1}\nb: [*a, *a]\nc: *a")
    assert read_yaml(file) == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}], "c": {"x": 1}}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000], ids=["lists", "objects", "digits"])
def test_json_beside_weights(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_config(tmp_path)
    with pytest.raises(CheckpointError):
        open_checkpoint(".", tmp_path)


def test_tables_that_are_none(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for content in (b"", b"\xff" * 16, len(header).to_bytes(8, "little") + header):
        (tmp_path / "tables").write_bytes(content)
        with pytest.raises(BundleError, match="holds no tensors"):
            read_tensors(tmp_path / "tables")


@pytest.mark.slow
def test_programs_whose_tables_point_out_of_them(executorch_bundle: Any, tmp_path: Path) -> None:
    """Opened with the runtime's least verification, these kill the process."""
    program = min(executorch_bundle.path.rglob("*.pte"), key=lambda p: p.stat().st_size).read_bytes()
    for at in (48, 64, 96):
        (tmp_path / "changed.pte").write_bytes(program[:at] + b"\xff" * 4 + program[at + 4 :])
        with pytest.raises(LoweringError, match="is not a program that ExecuTorch can load"):
            ExecuTorchEngine(tmp_path / "changed.pte", (), ())
