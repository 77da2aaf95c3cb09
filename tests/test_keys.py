"""Cache keys hold every tensor of a checkpoint: a warm build gives the bytes of a cold one, whichever changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toolchain
from toolchain.errors import CheckpointError
from toolchain.formats.recipe_file import parse_recipe
from toolchain.system.store import Store

WEIGHTS = "checkpoint/model.safetensors"


def build(project: Path, store: Store, name: str) -> dict[str, bytes]:
    """Every file of the bundle of the project's checkpoint."""
    data: dict[str, Any] = {
        "name": "keys",
        "model": "open-sora-v1.2",
        "video": {"frames": 17, "height": 32, "width": 48},
        "sampler": {"steps": 2},
        "transformer": {"checkpoint": "checkpoint"},
        "target": "onnx",
    }
    bundle = toolchain.compile_recipe(parse_recipe(data), project / name, base=project, store=store)
    assert bundle.manifest.gate.mode == "every"
    files = {str(p.relative_to(bundle.path)): p.read_bytes() for p in bundle.path.rglob("*") if p.is_file()}
    shutil.rmtree(bundle.path)
    return files


@pytest.mark.slow
def test_each_tensor_decides(project: Path, one_pair: Any) -> None:
    original: dict[str, torch.Tensor] = load_file(project / WEIGHTS)
    warm = Store(project / "warm")
    seen = [build(project, warm, "first")]
    for i, (name, tensor) in enumerate(sorted(original.items())):
        changed = original | {name: tensor * 1.25 + 0.01}
        (project / WEIGHTS).unlink()
        save_file(changed, project / WEIGHTS)
        found = build(project, warm, f"warm{i}")
        # cold but for the templates, which no weight decides
        cold = Store(project / f"cold{i}")
        shutil.copytree(warm.root / "templates", cold.root / "templates", copy_function=os.link)
        assert found == build(project, cold, f"bundle{i}"), name
        shutil.rmtree(cold.root)
        assert found != seen[-1], name
        seen = [found]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["rope.freqs", "y_embedder.y_embedding"])
@pytest.mark.slow
def test_a_table_of_nan_or_infinity_is_refused(project: Path, tensor: str, value: float) -> None:
    weights = {k: v.clone() for k, v in load_file(project / WEIGHTS).items()}
    weights[tensor].view(-1)[0] = value
    (project / WEIGHTS).unlink()
    save_file(weights, project / WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        build(project, Store(project / "store"), "bundle")
    assert str(error.value) == (
        f"transformer: tensor '{tensor}' has numbers that are NaN or infinite; mend the checkpoint"
    )
    assert not (project / "bundle").exists()
