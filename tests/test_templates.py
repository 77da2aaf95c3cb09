"""Stamping: what is stamped is what lowering gives, and what cannot be bound is refused."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.executorch import ExecuTorchTarget
from targets.onnx import OnnxTarget
from toolchain.blocks import Block
from toolchain.building import Builder, Source
from toolchain.checkpoint import open_checkpoint
from toolchain.components import Definition
from toolchain.digests import tensor_digests
from toolchain.lowering import Lowering
from toolchain.store import Store
from toolchain.target import Target, UnboundTemplateError, unique_weights

pytestmark = pytest.mark.slow

TARGETS: dict[str, Target] = {
    "executorch": ExecuTorchTarget(),
    "onnx": OnnxTarget(),
    "coreml-float16": CoreMLTarget(CoreMLConfig(precision="float16")),
    "coreml-float32": CoreMLTarget(CoreMLConfig(precision="float32")),
}


def content(path: Path) -> dict[str, str]:
    """Digests of an artifact's files."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module", params=list(TARGETS))
def case(request: pytest.FixtureRequest, cut_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A target, a pair block with its activations, a template of its structure, and a folder."""
    target = TARGETS[request.param]
    cut = cut_small(target.rules, frames=2)
    block: Block = cut.block("pair_0")
    folder = tmp_path_factory.mktemp(request.param)
    weights = unique_weights(block)
    artifact = target.lower(block, weights, folder / f"template{target.suffix}")
    return target, cut, block, target.bind(artifact, weights), folder


def test_stamped_is_direct_byte_for_byte(case: Any) -> None:
    target, cut, block, template, folder = case
    direct = target.lower(block, cut.weights(block), folder / f"direct{target.suffix}")
    stamped = target.stamp(template, cut.weights(block), folder / f"stamped{target.suffix}")
    assert stamped.functions == direct.functions == ("base", "merged")
    assert content(stamped.path) == content(direct.path)
    assert content(stamped.path) != content(template.artifact.path)


def test_degenerate_weights_keep_the_numbers(case: Any) -> None:
    """Zeros, ones and equal tensors, which lowering would simplify, are stamped like any others."""
    target, cut, block, template, folder = case
    weights = dict(cut.weights(block))
    for name in weights:
        if name.endswith("bias"):
            weights[name] = torch.zeros_like(weights[name])
        elif name.endswith("norm.weight"):
            weights[name] = torch.ones_like(weights[name])
    weights["temporal_blocks.0.mlp.fc1.weight"] = weights["spatial_blocks.0.mlp.fc1.weight"].clone()
    stamped = target.stamp(template, weights, folder / f"degenerate{target.suffix}")
    target.check(stamped.path, block)
    engine = target.engine(stamped.path, block.inputs, block.outputs)
    inputs = cut.inputs("pair_0")
    for function in ("base", "merged"):
        with torch.no_grad():
            (want,) = block.module(function, weights)(*inputs.values())
        got = engine(function, inputs)["x_out"]
        assert (got - want).norm() <= (1e-4 if target.precision == "float32" else 5e-3) * want.norm()


def test_ambiguous_weights_are_refused(case: Any) -> None:
    target, _, block, template, _ = case
    weights = unique_weights(block)
    weights["temporal_blocks.0.mlp.fc1.weight"] = weights["spatial_blocks.0.mlp.fc1.weight"]
    with pytest.raises(UnboundTemplateError):
        target.bind(template.artifact, weights)


def test_another_checkpoint_lowers_nothing(case: Any, tmp_path: Path) -> None:
    """The first block makes the template; it, another block and another checkpoint's are stamped from it."""
    target, cut, block, _, _ = case
    lowered: list[str] = []

    class Counting(type(target)):  # type: ignore[misc]
        def lower(self, block: Block, weights: Any, out: Path) -> Any:
            lowered.append(block.name)
            return super().lower(block, weights, out)

    store = Store(tmp_path / "store")
    artifacts = []
    for checkpoint in (cut.weights(block), {k: v + 1 for k, v in cut.weights(block).items()}):
        held = {s.tensor: checkpoint[k].reshape(s.shape) for k, s in block.weights.items()}
        builder = make_builder(Counting(target.config), block, held, tmp_path, store)
        artifacts += [builder.artifact(block), builder.artifact(block)]
    assert lowered == [block.name]
    assert artifacts[0] == artifacts[1] != artifacts[2] == artifacts[3]
    assert artifacts[0].files != artifacts[2].files


def make_builder(target: Target, block: Block, held: dict[str, torch.Tensor], folder: Path, store: Store) -> Builder:
    """A builder for one block, whose checkpoint holds ``held``."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    save_file({k: v.clone() for k, v in held.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder), folder)
    definition = Definition("transformer", {}, {}, ())
    lowering = Lowering(definition, target, (), (), (block,), (block,), ())
    return Builder(lowering, Source(checkpoint, tensor_digests(checkpoint)), store, direct=False)
