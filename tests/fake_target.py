"""A target without a converter, to try the conformance kit on: blocks in memory, their weights in files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from targets.forms.conv3d import CONV3D_BY_TAPS
from targets.forms.gelu import GELU_FORMULA
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, Port
from toolchain.ir.leaves import LegalForm
from toolchain.ir.target import Artifact, Engine, Target, TargetConfig, Template, distinct_functions


class FakeConfig(TargetConfig):
    precision: Literal["float32", "float16"] = "float32"


class FakeTarget(Target):
    """An artifact is a folder: ``block.json`` says which block it is, ``weights.bin`` has the weights in order."""

    name = "fake"
    suffix = ".fake"
    Config = FakeConfig
    blocks: ClassVar[dict[str, Block]] = {}

    @property
    def forms(self) -> tuple[LegalForm, ...]:
        return GELU_FORMULA, CONV3D_BY_TAPS

    def lower(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        self.blocks[block.structure()] = block
        out.mkdir()
        functions = distinct_functions(block)
        (out / "block.json").write_text(json.dumps({"block": block.structure(), "functions": functions}))
        self.write(block, weights, out)
        return Artifact(out, functions)

    def bind(self, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
        (artifact.path / "weights.bin").unlink()
        return Template(artifact, list(weights))

    def stamp(self, template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        out.mkdir()
        described = (template.artifact.path / "block.json").read_text()
        (out / "block.json").write_text(described)
        self.write(self.blocks[json.loads(described)["block"]], weights, out)
        return Artifact(out, template.artifact.functions)

    def write(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> None:
        with (out / "weights.bin").open("wb") as file:
            for name in block.weights:
                stored = weights[name].to(self.storage.parts(())[0].dtype.torch)
                if not torch.isfinite(stored).all():
                    raise LoweringError(f"weight '{name}' has numbers that cannot be stored")
                file.write(stored.contiguous().numpy().tobytes())

    def read(self, path: Path) -> tuple[Block, dict[str, torch.Tensor]]:
        try:
            block = self.blocks[json.loads((path / "block.json").read_text())["block"]]
            kind = {"float32": np.float32, "float16": np.float16}[self.precision]
            numbers = torch.from_numpy(np.fromfile(path / "weights.bin", kind).astype(np.float32))
            parts = numbers.split([w.parameters for w in block.weights.values()])
        except (OSError, ValueError, RuntimeError) as e:
            raise LoweringError(f"'{path.name}' cannot be read: {type(e).__name__}") from e
        return block, {n: p.reshape(block.weights[n].shape) for n, p in zip(block.weights, parts, strict=True)}

    def check(self, path: Path, block: Block) -> None:
        if self.read(path)[0].signatures != block.signatures:
            raise LoweringError(f"block '{block.name}': the artifact has other ports")

    def engine(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Engine:
        block, weights = self.read(path)

        def call(function: str, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                results = block.module(function, weights)(*(values[p.name] for p in inputs))
            return {p.name: self.computed(r) for p, r in zip(outputs, results, strict=True)}

        return call

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}

    def computed(self, value: torch.Tensor) -> Any:
        """A result before it is given: what tests break."""
        return value
