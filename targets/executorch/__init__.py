"""ExecuTorch: one ``.pte`` program a block, functions as methods, XNNPACK kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from targets.streams import quiet
from toolchain.ir.dtypes import INT8_ACTIVATIONS
from toolchain.ir.memory import Peak
from toolchain.ir.storage import Storage
from toolchain.ir.target import PRECISION, Artifact, Engine, Target, TargetConfig, Template, package_versions

if TYPE_CHECKING:
    import torch

    from toolchain.ir.blocks import Block, Port
    from toolchain.ir.leaves import LegalForm
    from toolchain.ir.operators import OperatorGraph
    from toolchain.ir.uses import Use


EXTRA = "sora-compile[executorch]"


class ExecuTorchConfig(TargetConfig):
    precision: Literal["float32"] = Field(default="float32", description=PRECISION)


class ExecuTorchTarget(Target):
    name = "executorch"
    suffix = ".pte"
    Config = ExecuTorchConfig

    @property
    def forms(self) -> tuple[LegalForm, ...]:
        from targets.forms.attention import ATTENTION_IN_BATCHES
        from targets.forms.conv3d import CONV3D_BY_TAPS
        from targets.forms.gelu import GELU_SIGMOID
        from targets.forms.patch_embedding import PATCHES_BY_LINEAR

        return PATCHES_BY_LINEAR, ATTENTION_IN_BATCHES, GELU_SIGMOID, CONV3D_BY_TAPS

    def keep(self, asked: Storage, use: Use) -> Storage:
        from targets.executorch.storages import keep

        return keep(asked, use)

    @property
    def int8_inputs_refusal(self) -> str | None:
        return "it rounds what comes into quantized linear layers to int8 already, each token with a range of its own"

    def arithmetic(self, block: Block) -> str:
        """Linear layers over quantized weights round what comes in to eight bits."""
        return INT8_ACTIVATIONS if block.quantized else self.precision

    def peak(self, block: Block, graph: OperatorGraph) -> Peak:
        from targets.executorch.memory import program_peak

        return program_peak(graph, self.value_bytes)

    def lower(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        with quiet():
            from targets.executorch.lower import lower

        return lower(block, weights, out)

    def bind(self, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
        from targets.executorch.stamp import bind

        return bind(artifact, weights)

    def stamp(self, template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        from targets.executorch.stamp import stamp

        return stamp(template, weights, out)

    def check(self, path: Path, block: Block) -> None:
        with quiet():
            from targets.executorch.engine import check

        check(path, block)

    def engine(self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Engine:
        package_versions("executorch", extra=EXTRA)
        with quiet(alone=False):
            from targets.executorch.engine import ExecuTorchEngine

        return ExecuTorchEngine(path, inputs, outputs)

    def versions(self) -> dict[str, str]:
        return package_versions("torch", "executorch", extra=EXTRA)
