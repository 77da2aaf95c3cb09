"""Templates: what cannot be bound is refused, and one template serves every checkpoint."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from passes.partition import Partition
from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.executorch import ExecuTorchTarget
from targets.onnx import OnnxTarget
from toolchain.build.artifacts import Builder
from toolchain.formats.recipe import ComponentRecipe
from toolchain.ir.blocks import Block, BlockPair
from toolchain.ir.passes import Pipeline
from toolchain.ir.target import Artifact, Target, UnboundTemplateError, unique_weights
from toolchain.models.family import Definition, find_family
from toolchain.planning.plan import ComponentPlan
from toolchain.planning.resolve import ResolvedComponent
from toolchain.system.store import Store
from toolchain.weights.checkpoint import open_checkpoint
from toolchain.weights.digests import tensor_digests

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
def case(request: pytest.FixtureRequest, cut_small: Any) -> tuple[Target, Any]:
    """A target, and a model cut for it."""
    target = TARGETS[request.param]
    return target, cut_small(target.forms, frames=2)


@pytest.fixture(scope="module")
def lowered(case: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Artifact, Mapping[str, torch.Tensor]]:
    """A target, a block lowered with unique weights, not bound, and these."""
    target, cut = case
    block = cut.block("caption")
    weights = unique_weights(block)
    return target, target.lower(block, weights, tmp_path_factory.mktemp("lowered") / f"caption{target.suffix}"), weights


FIRST, SECOND = "y_embedder.y_proj.fc1.bias", "y_embedder.y_proj.fc2.bias"
"""Two weights of one shape."""


def refuse(lowered: Any, weights: dict[str, torch.Tensor], reasons: dict[str, str]) -> None:
    """Hold that ``weights`` are not bound, that the target says why, and that the artifact stays whole."""
    target, artifact, _ = lowered
    before = content(artifact.path)
    with pytest.raises(UnboundTemplateError, match=reasons[target.name]):
        target.bind(artifact, weights)
    assert content(artifact.path) == before


def test_ambiguous_weights_are_refused(lowered: Any) -> None:
    reasons = {
        "executorch": "^two weights are found in the same place of the program$",
        "onnx": f"^weight '{SECOND}' is not where 'weights.bin' should have it$",  # by its name, it has one place
        "coreml": r"^the blob at byte \d+ is found in 2 weights$",
    }
    refuse(lowered, {**lowered[2], SECOND: lowered[2][FIRST]}, reasons)


def test_other_weights_are_not_bound(lowered: Any) -> None:
    reasons = {
        "executorch": f"^weight '{FIRST}' is found 0 times in the program$",
        "onnx": f"^weight '{FIRST}' is not where 'weights.bin' should have it$",
        "coreml": f"^weight '{FIRST}': 0 of 64 elements are in the package$",
    }
    refuse(lowered, {**lowered[2], FIRST: lowered[2][FIRST] + 1}, reasons)


def test_another_checkpoint_lowers_nothing(case: Any, tmp_path: Path) -> None:
    """The first block makes the template; it, another block and another checkpoint's are stamped from it."""
    target, cut = case
    block: Block = cut.block("caption")  # of more than one weight, and what lowers in the least time
    lowered: list[str] = []

    class Counting(type(target)):  # type: ignore[misc]
        def lower(self, block: Block, weights: Any, out: Path) -> Any:
            lowered.append(block.name)
            return super().lower(block, weights, out)

    store = Store(tmp_path / "store")
    artifacts = []
    for checkpoint in (cut.weights(block), {k: v + 1 for k, v in cut.weights(block).items()}):
        held = {name: checkpoint[k].reshape(w.shape) for k, w in block.weights.items() for name in w.source.tensors}
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
    part = ComponentRecipe(checkpoint=str(folder))
    resolved = ResolvedComponent(
        "transformer", part, find_family("open-sora-v1.2"), {}, target, Pipeline((), Partition()), checkpoint
    )
    plan = ComponentPlan(resolved, definition, (), (BlockPair(block, block),), {})
    return Builder(plan, tensor_digests(checkpoint), store, direct=False)
