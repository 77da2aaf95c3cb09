"""Functions for the conditional half of guidance: lowered, with their weights once, and run.

On ExecuTorch, where lowering takes longest, that is a case of test_executorch.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.onnx import OnnxTarget
from toolchain.ir.target import Target

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("target", "limit"),
    [(OnnxTarget(), 5e-6), (CoreMLTarget(CoreMLConfig(precision="float32")), 1e-5)],
    ids=["onnx", "coreml"],
)
def test_half_of_a_pair(target: Target, limit: float, cut_small: Any, tmp_path: Path) -> None:
    cut = cut_small(target.forms, frames=2, merged=False, functions=("base", "base_conditional"))
    block = cut.block("pair_0")
    weights = cut.weights(block)
    artifact = target.lower(block, weights, tmp_path / f"pair{target.suffix}")
    assert artifact.functions == ("base", "base_conditional")
    target.check(artifact.path, block)
    engine = target.engine(artifact.path, block.inputs, block.outputs)
    found = {f: engine(f, cut.inputs("pair_0", f))["x_out"] for f in artifact.functions}
    assert found["base_conditional"].shape == (1, *found["base"].shape[1:])
    for function, given in found.items():
        want = cut.expected("pair_0", function)["x_out"]
        assert (given - want).norm() <= limit * want.norm(), function
    torch.testing.assert_close(found["base_conditional"], found["base"][:1], rtol=1e-3, atol=1e-4)
    files = [artifact.path] if artifact.path.is_file() else [p for p in artifact.path.rglob("*") if p.is_file()]
    stored = b"".join(p.read_bytes() for p in files)
    for name, weight in weights.items():
        if weight.numel() > 64:  # small ones may be written into the program
            assert stored.count(weight.numpy().tobytes()) == 1, name
