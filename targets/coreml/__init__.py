"""Core ML: one ``.mlpackage`` a block (mlprogram, iOS 18), functions of a multifunction model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from targets.coreml.optional import hide_unused
from targets.streams import quiet
from toolchain.ir.affine import Affine
from toolchain.ir.dtypes import DTYPES, INT8_ACTIVATIONS
from toolchain.ir.palette import BITS, Palette
from toolchain.ir.residual import LowRank
from toolchain.ir.storage import Narrow, Storage
from toolchain.ir.target import (
    PRECISION,
    Artifact,
    Engine,
    Target,
    TargetConfig,
    Template,
    UnsupportedStorageError,
    package_versions,
)

if TYPE_CHECKING:
    import torch

    from toolchain.ir.blocks import Block, Port
    from toolchain.ir.labels import Labels
    from toolchain.ir.leaves import LegalForm
    from toolchain.ir.uses import Use

hide_unused()

EXTRA = "sora-compile[coreml]"

AFFINE_BITS = (8, 4)
"""Widths of the integers that Core ML scales."""


class CoreMLConfig(TargetConfig):
    precision: Literal["float16", "float32"] = Field(default="float16", description=PRECISION)


class CoreMLTarget(Target):
    name = "coreml"
    suffix = ".mlpackage"
    Config = CoreMLConfig

    @property
    def whole(self) -> Mapping[Callable[..., Any], str]:
        from targets.forms.gelu import gelu_formula

        return MappingProxyType({gelu_formula: "gelu"})

    @property
    def forms(self) -> tuple[LegalForm, ...]:
        from targets.forms.gelu import GELU_FORMULA
        from targets.forms.patch_embedding import PATCHES_BY_LINEAR
        from targets.forms.residual_stream import SMALL_RESIDUAL_STREAM

        always = (PATCHES_BY_LINEAR, GELU_FORMULA)
        return (*always, SMALL_RESIDUAL_STREAM) if self.precision == "float16" else always

    def keep(self, asked: Storage, use: Use) -> Storage:
        """Scales and tables are of the precision: Core ML gives a decompressed weight their type."""
        if use == "other":  # no operator takes it that Core ML decompresses weights for
            return super().keep(asked, use)
        if asked == self.storage:
            return asked
        number = DTYPES[self.precision]
        if isinstance(asked, Narrow) and (asked.dtype.name, asked.computed) == ("float16", number):
            return asked
        if isinstance(asked, Affine) and asked.bits in AFFINE_BITS:
            return dataclasses.replace(asked, scale=number)
        if isinstance(asked, LowRank):
            main = self.keep(asked.main, use)
            if use != "linear" or not isinstance(main, Affine):
                raise UnsupportedStorageError(f"it takes {main} without a rank")
            return dataclasses.replace(asked, main=main)
        if isinstance(asked, Palette) and asked.bits in BITS:
            return dataclasses.replace(asked, number=number)
        integers = ", ".join(f"int{bits}" for bits in AFFINE_BITS)
        plain = "float32, float16" if self.precision == "float32" else self.storage
        raise UnsupportedStorageError(f"it takes {plain}, {integers} and palettes of {', '.join(map(str, BITS))} bits")

    @property
    def int8_inputs_refusal(self) -> str | None:
        return None

    def arithmetic(self, block: Block) -> str:
        """What float16 rounds before a layer rounds to eight bits falls to the other side at times: by a whole step."""
        return INT8_ACTIVATIONS if block.int8_inputs and self.precision == "float16" else self.precision

    def lower(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        with quiet():
            from targets.coreml.lower import lower

        return lower(block, weights, out, self.precision)

    def bind(self, artifact: Artifact, weights: Mapping[str, torch.Tensor]) -> Template:
        from targets.coreml.stamp import bind

        return bind(artifact, weights)

    def stamp(self, template: Template, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        from targets.coreml.stamp import stamp

        return stamp(template, weights, out)

    def check(self, path: Path, block: Block) -> None:
        with quiet():
            from targets.coreml.check import check

        check(path, block, self.precision)

    def label(self, path: Path, labels: Labels) -> tuple[Path, ...]:
        from targets.coreml.labels import label

        return label(path, labels)

    def engine(
        self, path: Path, inputs: Sequence[Port], outputs: Sequence[Port], *, device: bool | None = None
    ) -> Engine:
        """Load a package for execution.

        Args:
            device: with Core ML itself, which only macOS has; else on torch. By default, what the machine has.

        Raises:
            LoweringError: the package is damaged, of another block, or has what the engine does not know.
        """
        package_versions("coremltools", extra=EXTRA)  # has the schema of packages
        if sys.platform == "darwin" if device is None else device:
            with quiet():
                from targets.coreml.device import CoreMLDevice

            return CoreMLDevice(path, inputs, outputs)
        from targets.coreml.engine import CoreMLEngine

        return CoreMLEngine(path, inputs, outputs)

    def versions(self) -> dict[str, str]:
        return package_versions("torch", "coremltools", extra=EXTRA)
