"""The pass that casts to float16: where it stands, what it asks of constants, and that it leaves coremltools alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

import toolchain
from targets.coreml import CoreMLTarget
from targets.coreml.float16 import OWN_PASS, PIECE, REPLACED_PASS, CastToFloat16, with_own_float16
from toolchain.ir.target import unique_weights


def test_it_stands_in_the_place_of_coremltools_own() -> None:
    default, own = ct.PassPipeline.DEFAULT.passes, with_own_float16(ct.PassPipeline.DEFAULT).passes
    assert [p for p in own if p != OWN_PASS] == [p for p in default if p != REPLACED_PASS]
    assert own.index(OWN_PASS) == default.index(REPLACED_PASS)
    assert REPLACED_PASS in ct.PassPipeline.DEFAULT.passes
    assert isinstance(PASS_REGISTRY[OWN_PASS], CastToFloat16)
    assert PASS_REGISTRY[OWN_PASS] is not PASS_REGISTRY[OWN_PASS]  # one a conversion


def test_a_pipeline_without_the_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="coremltools has no pass 'common::add_fp16_cast' any more"):
        with_own_float16(ct.PassPipeline.EMPTY)


def added(constant: Any) -> Any:
    """The operator of ``x + constant``."""

    @mb.program(input_specs=[mb.TensorSpec(shape=np.shape(constant) or (1,))])
    def program(x: Any) -> Any:
        return mb.add(x=x, y=constant)

    return program.find_ops(op_type="add")[0]


@pytest.mark.parametrize(
    ("number", "overflows"),
    [(1.0, False), (65504.0, False), (-65504.0, False), (65520.0, True), (-7e4, True), (3e38, False), (-np.inf, False)],
)
@pytest.mark.parametrize("place", [None, 0, PIECE, PIECE + 4], ids=["scalar", "first", "next piece", "last"])
def test_constants_overflow_as_coremltools_says(number: float, overflows: bool, place: int | None) -> None:
    constant = np.float32(number) if place is None else np.zeros(PIECE + 5, np.float32)
    if place is not None:
        constant[place] = number
    op = added(constant)
    assert CastToFloat16.fp16_overflow(op) == FP16ComputePrecision.fp16_overflow(op) == overflows


@pytest.mark.slow
def test_what_a_process_built_before_changes_no_bytes(tmp_path: Path) -> None:
    """Operators without a name are counted in the whole process."""
    block = toolchain.plan(toolchain.load_recipe("tiny", ["target=coreml"])).components["text_encoder"].blocks[0]
    written = []
    for count in (0, 28):
        mb.name_count["add"] = count
        out = tmp_path / f"{count}.mlpackage"
        CoreMLTarget().lower(block, unique_weights(block), out)
        written.append((out / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    assert written[0] == written[1]
