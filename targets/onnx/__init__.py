"""ONNX: a folder a block, with one simplified ``.onnx`` model a function and one file of weights for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from targets.streams import quiet
from toolchain.ir.memory import Peak, peak
from toolchain.ir.storage import Storage
from toolchain.ir.target import PRECISION, Artifact, Engine, Target, TargetConfig, Template, package_versions

if TYPE_CHECKING:
    import torch

    from toolchain.ir.blocks import Block, Port
    from toolchain.ir.labels import Labels
    from toolchain.ir.operators import OperatorGraph
    from toolchain.ir.uses import Use


EXTRA = "sora-compile[onnx]"


class OnnxConfig(TargetConfig):
    precision: Literal["float32"] = Field(default="float32", description=PRECISION)


class OnnxTarget(Target):
    name = "onnx"
    suffix = ""
    Config = OnnxConfig

    def keep(self, asked: Storage, use: Use) -> Storage:
        from targets.onnx.storages import keep

        return keep(asked, use)

    def peak(self, block: Block, graph: OperatorGraph) -> Peak:
        from targets.onnx.memory import FREED_LATE, effect

        return peak(graph, self.value_bytes, lambda o: effect(o, block, self.value_bytes), late=FREED_LATE)

    def lower(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        with quiet():
            from targets.onnx.lower import lower

        return lower(block, weights, out)

    def bind(self, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
        from targets.onnx.stamp import bind

        return bind(artifact, weights)

    def stamp(self, template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        from targets.onnx.stamp import stamp

        return stamp(template, weights, out)

    def check(self, path: Path, block: Block) -> None:
        from targets.onnx.check import check

        check(path, block)

    def label(self, path: Path, labels: Labels) -> tuple[Path, ...]:
        from targets.onnx.labels import label

        return label(path, labels)

    def engine(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Engine:
        package_versions("onnx", "onnxruntime", extra=EXTRA)
        with quiet():
            from targets.onnx.engine import OnnxEngine

        return OnnxEngine(path, inputs, outputs)

    def versions(self) -> dict[str, str]:
        return package_versions("torch", "onnx", "onnxscript", "onnx-ir", "onnxsim", "onnxruntime", extra=EXTRA)
