"""Cache keys hold every tensor of a checkpoint: a warm build gives the bytes of a cold one, whichever changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import toolchain
from toolchain.build.artifacts import Builder
from toolchain.errors import CheckpointError
from toolchain.formats.recipe_file import parse_recipe
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.store import Store
from toolchain.weights.checkpoint import open_checkpoint
from toolchain.weights.digests import checkpoint_digest, tensor_digests

WEIGHTS = "checkpoint/model.safetensors"
TABLES = ("rope.freqs", "y_embedder.y_embedding")
EXAMPLES = (
    "y_embedder.y_proj.fc1.weight",
    "t_block.1.bias",
    "temporal_blocks.0.attn.qkv.weight",
    "final_layer.scale_shift_table",
    *TABLES,
)
RECIPE: dict[str, Any] = {
    "name": "keys",
    "model": "open-sora-v1.2",
    "video": {"frames": 17, "height": 32, "width": 48},
    "sampler": {"steps": 2},
    "transformer": {"checkpoint": "checkpoint"},
    "target": "onnx",
}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What all builds share."""
    return Store(tmp_path_factory.mktemp("warm"))


def build(project: Path, store: Store, name: str) -> dict[str, bytes]:
    """Every file of the bundle of the project's checkpoint."""
    bundle = toolchain.compile_recipe(parse_recipe(RECIPE), project / name, base=project, store=store)
    assert bundle.manifest.gate.mode == "every"
    files = {str(p.relative_to(bundle.path)): p.read_bytes() for p in bundle.path.rglob("*") if p.is_file()}
    shutil.rmtree(bundle.path)
    return files


def owner(tensor: str) -> str | None:
    """The block that keeps a tensor; None where it is but for the tables."""
    if tensor in TABLES:
        return None
    if "_blocks.0." in tensor:
        return "pair_0"
    if tensor.startswith("y_embedder."):
        return "caption"
    return "final" if tensor.startswith("final_layer.") else "embed"


def change(project: Path, tensor: str) -> None:
    """Give the project's checkpoint other numbers in one tensor."""
    tensors = load_file(project / WEIGHTS)
    (project / WEIGHTS).unlink()
    save_file(tensors | {tensor: tensors[tensor] * 1.25 + 0.01}, project / WEIGHTS)


@pytest.mark.slow
def test_each_tensor_decides_the_keys_of_its_block(project: Path) -> None:
    """And no other's: of its artifact, of its passage through the gate, and the whole checkpoint's."""
    planned = plan_resolved(resolve(parse_recipe(RECIPE), project, checkpoints=True))
    part, store = planned.components["transformer"], Store(project / "store")

    def keys() -> tuple[dict[str, tuple[str, str]], str]:
        digests = tensor_digests(open_checkpoint("checkpoint", project), store)
        builder = Builder(part, digests, store, False)
        own = {p.name: (builder.artifact_key(p.lowered), builder.weights_digest(p.plain)) for p in part.pairs}
        return own, checkpoint_digest(digests)

    before, whole = keys()
    assert len(before) == 4
    for tensor in load_file(project / WEIGHTS):
        change(project, tensor)
        found, now = keys()
        other = {name for name in found if found[name][0] != before[name][0]}
        assert other == {name for name in found if found[name][1] != before[name][1]}, tensor
        assert other == {owner(tensor)} - {None}, tensor
        assert now != whole, tensor
        before, whole = found, now


@pytest.mark.slow
@pytest.mark.parametrize("tensor", EXAMPLES)
def test_a_warm_build_is_a_cold_one(warm: Store, project: Path, tensor: str) -> None:
    """One tensor of each block, and each of the tables."""
    before = build(project, warm, "before")
    change(project, tensor)
    found = build(project, warm, "warm")
    assert found != before
    # cold but for the templates, which no weight decides
    cold = Store(project / "cold")
    shutil.copytree(warm.root / "templates", cold.root / "templates", copy_function=os.link)
    assert found == build(project, cold, "bundle")


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
