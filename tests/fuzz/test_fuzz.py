"""Files that others wrote are read or refused in one line: no other error, no code of theirs run, little memory taken.

``SORA_COMPILE_FUZZ_EXAMPLES`` says how many files of each kind are tried (``make fuzz``), ``…_SEED`` which.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
EXAMPLES = os.environ.get("SORA_COMPILE_FUZZ_EXAMPLES", "12")
SEED = os.environ.get("SORA_COMPILE_FUZZ_SEED", "0")
WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.zeros(5, dtype=torch.float16)}


def batch(folder: Path) -> dict[str, dict[str, int]]:
    """How reading ended, by reader."""
    command = [sys.executable, str(Path(__file__).with_name("batch.py")), str(folder), EXAMPLES, SEED]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return found


def accepted(found: dict[str, dict[str, int]]) -> bool:
    return all(ends.keys() <= {"read", "refused"} for ends in found.values())


@pytest.mark.slow
def test_files_of_a_checkpoint_and_a_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(ROOT / "recipes/tiny.yaml", folder / "recipe.yaml")
    shutil.copy(ROOT / "recipes/tiny/text_encoder/spiece.model", folder)
    shutil.copy(ROOT / "recipes/tiny/transformer/config.json", folder)
    for name in ("model.safetensors", "tables.safetensors"):
        save_file(WEIGHTS, folder / name)
    for name in ("model.pt", "archive.pt"):
        torch.save(WEIGHTS, folder / name)
    index = {"weight_map": dict.fromkeys(WEIGHTS, "tables.safetensors")}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    found = batch(folder)
    assert len(found) == 8
    assert accepted(found), found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_artifacts(request: pytest.FixtureRequest, tmp_path: Path, target: str) -> None:
    built: Any = request.getfixturevalue(f"{target}_bundle")
    shutil.copytree(built.path, tmp_path / "files" / target)
    found = batch(tmp_path / "files")
    assert accepted(found), found
