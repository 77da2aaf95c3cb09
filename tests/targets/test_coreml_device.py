"""Running packages with Core ML itself, for which a fake stands in; and which engine a machine gets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813  its own name for it
from coremltools.converters.mil.mil import types
from one_op import IOS18, floats, save

import toolchain
from targets.coreml import CoreMLTarget
from targets.coreml.device import CoreMLDevice
from targets.coreml.engine import CoreMLEngine
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Port

X = torch.from_numpy(floats(3, 8))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = 2 x in float16, [3, 8]. Read only."""

    @mb.program(input_specs=[mb.TensorSpec((3, 8), types.fp16)], opset_version=IOS18)
    def program(x: Any) -> Any:
        return mb.mul(x=x, y=np.float16(2), name="y")

    return save(program, tmp_path_factory.mktemp("package"))


class FakeModel:
    """What coremltools' MLModel is on macOS, as far as the engine uses it."""

    made: list[tuple[str, Any, Any]] = []  # noqa: RUF012

    def __init__(self, path: str, function_name: str | None = None, compute_units: Any = None) -> None:
        self.made.append((path, function_name, compute_units))

    def predict(self, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert {k: v.dtype for k, v in data.items()} == {"x": np.float16}
        if data["x"].max() > 100:
            raise Exception("Core ML says\nno")
        return {"y": 2 * data["x"], "unasked": np.zeros(1)}


@pytest.fixture
def device(package: Path, monkeypatch: pytest.MonkeyPatch) -> CoreMLDevice:
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    monkeypatch.setattr(FakeModel, "made", [])
    return CoreMLDevice(package, [Port("x", (3, 8))], [Port("y", (3, 8))])


def test_the_device_runs_what_the_package_takes(device: CoreMLDevice, package: Path) -> None:
    assert FakeModel.made == []
    for _ in range(2):
        found = device("base", {"x": X})
        assert found.keys() == {"y"} and found["y"].dtype == torch.float32
        assert torch.equal(found["y"], (2 * X.half()).float())
    assert FakeModel.made == [(str(package), None, ct.ComputeUnit.ALL)]


def test_the_device_calls_functions_by_name(tmp_path: Path, package: Path, request: pytest.FixtureRequest) -> None:
    both = ct.utils.MultiFunctionDescriptor()
    for name in ("base", "merged"):
        both.add_function(str(package), "main", name)
    both.default_function_name = "base"
    ct.utils.save_multifunction(both, str(tmp_path / "both.mlpackage"))
    request.getfixturevalue("device")
    device = CoreMLDevice(tmp_path / "both.mlpackage", [], [Port("y", (3, 8))])
    assert device.functions == {"base", "merged"}
    for name in ("merged", "base", "merged"):
        device(name, {"x": X})
    assert [name for _, name, _ in FakeModel.made] == ["merged", "base"]


def test_the_device_refuses_as_the_engine_does(device: CoreMLDevice) -> None:
    with pytest.raises(LoweringError, match="input 'x' is missing"):
        device("base", {})
    with pytest.raises(
        LoweringError, match=r"'one\.mlpackage', function 'base': Core ML cannot run it: Core ML says no"
    ):
        device("base", {"x": 200 + X})


def test_the_machine_decides_which_engine(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**options: Any) -> type:
        return type(CoreMLTarget().engine(package, [], [], **options))

    monkeypatch.setattr("sys.platform", "linux")
    assert make() is CoreMLEngine and make(device=True) is CoreMLDevice
    monkeypatch.setattr("sys.platform", "darwin")
    assert make() is CoreMLDevice and make(device=False) is CoreMLEngine


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "darwin", reason="only macOS has Core ML itself")
def test_core_ml_itself(package: Path, coreml_bundle: Any) -> None:
    device = CoreMLDevice(package, [Port("x", (3, 8))], [Port("y", (3, 8))])
    assert torch.equal(device("base", {"x": X})["y"], (2 * X.half()).float())
    assert not toolchain.verify(coreml_bundle.path).failed
