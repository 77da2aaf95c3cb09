"""Packages of one operator, and what coremltools itself says that they compute.

An operator that is built of constants carries the result of coremltools' own NumPy definition, where there is
one. The program is saved without any of the converter's passes, so the operator is still there to be run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools import proto
from coremltools.converters.mil import Builder as mb  # noqa: N813  its own name for it
from coremltools.converters.mil.backend.mil.load import MILProtoExporter

from targets.coreml.engine import CoreMLEngine
from toolchain.ir.blocks import Port

Arguments = Mapping[str, Any]
Opset = Any
IOS18 = ct.target.iOS18


def save(program: Any, folder: Path, opset: Opset = IOS18) -> Path:
    """A MIL program as it is, as a package."""
    weights = folder / "staged"
    weights.mkdir()
    spec = proto.Model_pb2.Model(specificationVersion=opset.value)
    spec.mlProgram.CopyFrom(MILProtoExporter(program, str(weights), opset.value).export())
    ct.utils.save_spec(spec, str(folder / "one.mlpackage"), weights_dir=str(weights))
    return folder / "one.mlpackage"


def build(op: str, arguments: Arguments, folder: Path, opset: Opset = IOS18) -> tuple[Path, list[Any]]:
    """The package of one operator over constants, and the operator's outputs."""

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=opset)
    def program(unused: Any) -> Any:
        return getattr(mb, op)(**copy.deepcopy(dict(arguments)))  # coremltools computes some of them in place

    return save(program, folder, opset), list(program.functions["main"].outputs)


def engine(package: Path, outputs: list[Any], arithmetic: Any = "rounded") -> Callable[..., list[np.ndarray]]:
    """Calls a package's function; outputs in order."""
    loaded = CoreMLEngine(package, [], [Port(v.name, ()) for v in outputs], arithmetic)

    def call(**inputs: torch.Tensor) -> list[np.ndarray]:
        results = loaded("base", inputs or {"unused": torch.zeros(1)})
        return [results[v.name].numpy() for v in outputs]

    return call


def results(op: str, arguments: Arguments, folder: Path, opset: Opset = IOS18) -> tuple[list[Any], list[Any]]:
    """What the engine computes, and what coremltools says (``None`` where it says nothing)."""
    package, outputs = build(op, arguments, folder, opset)
    said = [v.op.materialized_val_inference() if "constexpr" in v.op.op_type else v.val for v in outputs]
    if len(outputs) > 1 and isinstance(said[0], tuple):
        said = list(said[0])
    return engine(package, outputs)(), said


def hold(found: np.ndarray, expected: Any, *, float16: bool = False) -> None:
    """Equal for all but floats, which are close: to four digits when a result was ``float16``."""
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    if expected.dtype.kind != "f":
        assert found.dtype == expected.dtype or (expected.dtype.kind in "iu" and found.dtype.kind in "iu")
        np.testing.assert_array_equal(found, expected)
    elif float16 or expected.dtype == np.float16:
        np.testing.assert_allclose(found, expected.astype(np.float32), rtol=2e-3, atol=1e-3)
    else:
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=1)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6 * scale)


def floats(*shape: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def halves(*shape: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    return floats(*shape, seed=seed, low=low, high=high).astype(np.float16)


def ints(*shape: int, seed: int = 0, low: int = -5, high: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def bools(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5
