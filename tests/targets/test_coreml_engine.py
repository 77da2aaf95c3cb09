"""The Core ML engine: how packages are loaded, run, traced and refused. Whole blocks are in test_coreml_blocks.py."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813  its own name for it
from coremltools.converters.mil.mil import get_new_symbol, types
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from one_op import IOS18, floats, halves, save

from targets.coreml.engine import CoreMLEngine
from targets.coreml.ops import OPERATORS
from targets.coreml.program import read_program
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Port

ROOT = Path(__file__).parents[2]
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
F16, F32 = types.fp16, types.fp32
WIDTH = 64


def program(body: Callable[..., Any], *specs: Any) -> Any:
    """A MIL program of one function."""
    return mb.program(input_specs=list(specs), opset_version=IOS18)(body)


def load(body: Callable[..., Any], folder: Path, *specs: Any, arithmetic: Any = "rounded") -> CoreMLEngine:
    """An engine of a program, with its outputs as ports."""
    made = program(body, *specs)
    outputs = [Port(v.name, ()) for v in made.functions["main"].outputs]
    return CoreMLEngine(save(made, folder), [], outputs, arithmetic)


def two_layers(x: Any) -> Any:
    hidden = mb.linear(x=x, weight=halves(WIDTH, 8), bias=halves(WIDTH, seed=1), name="hidden")
    active = mb.gelu(x=hidden, mode="TANH_APPROXIMATION", name="active")
    return mb.linear(x=active, weight=halves(8, WIDTH, seed=2, low=-0.2, high=0.2), name="y")


def expected_layers(x: torch.Tensor) -> torch.Tensor:
    weights = [torch.from_numpy(w.astype(np.float32)) for w in (halves(WIDTH, 8), halves(WIDTH, seed=1))]
    hidden = torch.nn.functional.linear(x, *weights).half().float()
    active = torch.nn.functional.gelu(hidden, approximate="tanh").half().float()
    last = torch.from_numpy(halves(8, WIDTH, seed=2, low=-0.2, high=0.2).astype(np.float32))
    return torch.nn.functional.linear(active, last).half().float()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in float16, x [3, 8] to y [3, 8]. Read only."""
    made = program(two_layers, mb.TensorSpec((3, 8), F16))
    return save(made, tmp_path_factory.mktemp("package"))


@pytest.fixture
def layers(package: Path) -> CoreMLEngine:
    return CoreMLEngine(package, [Port("x", (3, 8))], [Port("y", (3, 8))])


X = torch.from_numpy(floats(3, 8))
ROUNDED = X.half().float()


# --- calls -------------------------------------------------------------------------------------------


def test_inputs_are_rounded_and_outputs_are_float32(layers: CoreMLEngine) -> None:
    assert layers.functions == {"base"}
    for given_x in (X, X.double(), X.half()):
        (name, y), *rest = layers("base", {"x": given_x}).items()
        assert (name, y.dtype, rest) == ("y", torch.float32, [])
        torch.testing.assert_close(y, expected_layers(ROUNDED), rtol=1e-3, atol=1e-3)
        assert torch.equal(y, y.half().float())


def test_calls_do_not_share_memory(tmp_path: Path) -> None:
    """An output may be an input, or a constant."""
    weights = floats(4, 5)

    def body(x: Any) -> Any:
        return mb.identity(x=x, name="same"), mb.identity(x=weights, name="weights")

    engine = load(body, tmp_path, mb.TensorSpec((2,)))
    x = torch.ones(2)
    first = engine("base", {"x": x})
    first["same"].zero_()
    first["weights"].zero_()
    second = engine("base", {"x": x})
    assert x.tolist() == [1, 1] and second["same"].tolist() == [1, 1]
    assert np.array_equal(second["weights"].numpy(), weights)


@pytest.mark.slow
def test_coremltools_is_not_needed_and_not_disturbed(package: Path) -> None:
    """Importing it takes seconds; its protobuf classes work when it is imported later all the same."""
    code = f"""
import sys
from pathlib import Path
import torch
from targets.coreml import CoreMLTarget
from toolchain.ir.blocks import Port
engine = CoreMLTarget().engine(Path({str(package)!r}), [], [Port("y", ())], device=False)
assert engine("base", {{"x": torch.zeros(3, 8)}})["y"].shape == (3, 8)
assert "coremltools" not in sys.modules
import coremltools as ct
assert ct.utils.load_spec({str(package)!r}).WhichOneof("Type") == "mlProgram"
ct.proto.Model_pb2.Model(mlProgram=ct.proto.MIL_pb2.Program(version=1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_integers(tmp_path: Path) -> None:
    body = lambda x: mb.gather(x=np.array([5, 7, 9], np.int32), indices=x, name="y")  # noqa: E731
    engine = load(body, tmp_path, mb.TensorSpec((2,), types.int32))
    found = engine("base", {"x": torch.tensor([2, 0])})["y"]
    assert (found.dtype, found.tolist()) == (torch.int32, [9, 5])


def test_sizes_that_are_not_fixed(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        length = mb.gather(x=mb.shape(x=x), indices=0)
        shape = mb.concat(values=[length, np.int32(2), np.int32(-1)], axis=0)
        return mb.reduce_sum(x=mb.reshape(x=x, shape=shape), axes=[1], name="y")

    engine = load(body, tmp_path, mb.TensorSpec((get_new_symbol(), 6)))
    for rows in (1, 4):
        x = torch.randn(rows, 6)
        assert torch.allclose(engine("base", {"x": x})["y"], x.reshape(rows, 2, 3).sum(1))
    with pytest.raises(LoweringError, match=r"input 'x' is float32 \[2, 5\]; give it float32 \[\?, 6\]"):
        engine("base", {"x": torch.ones(2, 5)})


def test_weights_are_mapped_not_read(tmp_path: Path) -> None:
    """And a constant that several operators use is converted for each, but never kept when it is large."""
    body = lambda x: mb.linear(x=x, weight=floats(300, 200), name="y")  # noqa: E731
    path = save(program(body, mb.TensorSpec((1, 200))), tmp_path)
    (large,) = [c for c in read_program(path)["main"].constants.values() if c.shape == (300, 200)]
    assert large.tensor().data_ptr() == large.tensor().data_ptr()
    data = (path / WEIGHTS).read_bytes()
    at = data.index(floats(300, 200).tobytes())
    engine = CoreMLEngine(path, [], [Port("y", ())])
    with (path / WEIGHTS).open("r+b") as f:
        f.seek(at)
        f.write(bytes(floats(300, 200).nbytes))
    assert not engine("base", {"x": torch.ones(1, 200)})["y"].any()


# --- arithmetic --------------------------------------------------------------------------------------

NUMBERS = arrays.arrays(np.float16, 7, elements=st.floats(width=16, allow_nan=False, allow_subnormal=True))
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "maximum": np.maximum}


@pytest.fixture(scope="module")
def calculators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CoreMLEngine, CoreMLEngine]]:
    def body(x: Any, y: Any) -> Any:
        return [getattr(mb, op)(x=x, y=y, name=op) for op in EXACT] + [mb.sqrt(x=mb.abs(x=x), name="sqrt")]

    path = save(
        program(body, mb.TensorSpec((7,), F16), mb.TensorSpec((7,), F16)), tmp_path_factory.mktemp("calculator")
    )
    ports = [Port(name, ()) for name in (*EXACT, "sqrt")]
    return {a: CoreMLEngine(path, [], ports, a) for a in ("rounded", "native")}


@settings(max_examples=150, deadline=None)
@given(NUMBERS, NUMBERS)
@pytest.mark.slow
def test_float16_is_rounded_as_float16_is(calculators: Any, x: np.ndarray, y: np.ndarray) -> None:
    """Bit for bit, whatever the numbers, infinities included: float32 has digits enough to be rounded twice."""
    with np.errstate(all="ignore"):
        expected = {op: f(x, y).astype(np.float32) for op, f in EXACT.items()} | {"sqrt": np.sqrt(np.abs(x))}
    for engine in calculators.values():
        for op, found in engine("base", {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}).items():
            np.testing.assert_array_equal(found.numpy(), expected[op], err_msg=op)


def test_every_float16_has_its_square_root(tmp_path: Path) -> None:
    x = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    engine = load(lambda x: mb.sqrt(x=x, name="y"), tmp_path, mb.TensorSpec(x.shape, F16))
    np.testing.assert_array_equal(engine("base", {"x": torch.from_numpy(x)})["y"].numpy(), np.sqrt(x))


def test_what_float16_cannot_store_is_infinite(tmp_path: Path) -> None:
    body = lambda x: (mb.square(x=x, name="square"), mb.mul(x=mb.square(x=x), y=np.float16(0), name="times"))  # noqa: E731
    engine = load(body, tmp_path, mb.TensorSpec((2,), F16))
    found = engine("base", {"x": torch.tensor([255.0, 300.0])})
    assert found["square"].tolist() == [65024, float("inf")]
    assert found["times"][1].isnan()


@pytest.mark.parametrize(
    "body",
    [
        lambda x: mb.layer_norm(x=x, axes=[-1], name="y"),
        lambda x: mb.l2_norm(x=x, name="y"),
        lambda x: mb.reduce_l2_norm(x=x, axes=[-1], name="y"),
        lambda x: mb.reduce_mean(x=mb.square(x=mb.mul(x=x, y=np.float16(0.3))), axes=[-1], name="y"),
        lambda x: mb.scaled_dot_product_attention(query=x, key=x, value=x, name="y"),
    ],
    ids=["layer_norm", "l2_norm", "reduce_l2_norm", "reduce_mean", "attention"],
)
def test_native_arithmetic_shows_what_overflows_inside_an_operator(body: Any, tmp_path: Path) -> None:
    """Values of some hundreds: fine as they are and as results, but not squared or summed on the way."""
    x = torch.from_numpy(floats(1, 2, 64, low=200, high=800) * np.where(np.arange(64) % 2, 1, -1).astype(np.float32))
    made = program(body, mb.TensorSpec((1, 2, 64), F16))
    path = save(made, tmp_path)
    rounded, native = (CoreMLEngine(path, [], [Port("y", ())], a)("base", {"x": x})["y"] for a in ("rounded", "native"))
    assert rounded.isfinite().all() and rounded.any()
    assert not native.isfinite().all() or not native.any()


def test_native_arithmetic_agrees_where_nothing_overflows(package: Path) -> None:
    rounded, native = (
        CoreMLEngine(package, [], [Port("y", ())], a)("base", {"x": X})["y"] for a in ("rounded", "native")
    )
    assert 0 < float((rounded - native).norm() / rounded.norm()) < 2e-3


# --- traces ------------------------------------------------------------------------------------------


def test_a_trace_has_every_operation_in_order(layers: CoreMLEngine) -> None:
    seen = [(v.name, v.op, v.dtype, tuple(v.value.shape)) for v in layers.trace("base", {"x": X})]
    assert seen == [
        ("hidden", "linear", "float16", (3, WIDTH)),
        ("active", "gelu", "float16", (3, WIDTH)),
        ("y", "linear", "float16", (3, 8)),
    ]
    hidden, active, y = layers.trace("base", {"x": X})
    assert (hidden.inputs[0], active.inputs[0], y.inputs[0]) == ("x", "hidden", "active")
    assert torch.equal(y.value, layers("base", {"x": X})["y"])


def test_weights_are_decompressed_where_they_are_used(tmp_path: Path) -> None:
    """Converters put all of it in front, where the whole model would be in memory at once."""
    scale = np.ones((4, 1), np.float32)

    def body(x: Any) -> Any:
        made = [mb.constexpr_blockwise_shift_scale(data=np.full((4, 4), i, np.int8), scale=scale) for i in (1, 2)]
        return mb.linear(x=mb.linear(x=x, weight=made[1]), weight=made[0], name="y")

    engine = load(body, tmp_path, mb.TensorSpec((1, 4)))
    ops = [v.op for v in engine.trace("base", {"x": torch.ones(1, 4)})]
    assert ops == ["constexpr_blockwise_shift_scale", "linear"] * 2
    assert engine("base", {"x": torch.ones(1, 4)})["y"].tolist() == [[32] * 4]


def test_values_are_freed_at_their_last_use(layers: CoreMLEngine) -> None:
    values = {"x": ROUNDED}
    alive = [set(values) for _ in layers._steps("base", values)]
    assert alive == [{"x", "hidden"}, {"hidden", "active"}, {"active", "y"}]
    assert set(values) == {"y"}


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x' is missing; give it x"),
        ({"x": X, "z": X}, "has no input 'z'; give it x"),
        ({"x": X[:2]}, "input 'x' is float32 [2, 8]; give it float16 [3, 8]"),
        ({"x": X[0]}, "input 'x' is float32 [8]; give it float16 [3, 8]"),
        ({"x": X.int()}, "input 'x' is int32 [3, 8]; give it float16 [3, 8]"),
    ],
)
def test_inputs_that_do_not_fit(layers: CoreMLEngine, inputs: Any, message: str) -> None:
    with pytest.raises(LoweringError, match=re.escape(f"'one.mlpackage', function 'base': {message}")):
        layers("base", inputs)


def test_a_function_that_is_not_there(layers: CoreMLEngine) -> None:
    with pytest.raises(LoweringError, match=r"'one\.mlpackage' has no function 'merged'; call one of base"):
        layers("merged", {"x": X})


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_package_of_another_block(package: Path, side: str) -> None:
    ports = {"input": [], "output": [], side: [Port("z", ())]}
    with pytest.raises(LoweringError, match=rf"function 'base': has no {side} 'z', only"):
        CoreMLEngine(package, ports["input"], ports["output"])


def test_an_operator_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPERATORS, "gelu")
    message = r"^'one\.mlpackage': function 'main', operator 'active' \(gelu\): this engine does not know the operator"
    with pytest.raises(LoweringError, match=message.replace("main", "base")) as e:
        load(two_layers, tmp_path, mb.TensorSpec((3, 8), F16))
    assert "\n" not in str(e.value)


def test_control_flow(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return mb.cond(
            pred=mb.squeeze(x=mb.greater(x=x, y=0.0)), _true_fn=lambda: x, _false_fn=lambda: mb.add(x=x, y=x)
        )

    with pytest.raises(LoweringError, match=r"\(cond\): this engine has no control flow; unroll it"):
        load(body, tmp_path, mb.TensorSpec((1,)))


def test_an_operator_that_fails_is_named(tmp_path: Path) -> None:
    body = lambda x: mb.gather(x=np.arange(3, dtype=np.float32), indices=x, name="chosen")  # noqa: E731
    engine = load(body, tmp_path, mb.TensorSpec((1,), types.int32))
    message = r"function 'base', operator 'chosen' \(gather\): failed when run: index 3 is out of bounds for size 3"
    with pytest.raises(LoweringError, match=message):
        engine("base", {"x": torch.tensor([3])})


def damaged(package: Path, folder: Path, change: Callable[[bytearray], None]) -> Path:
    copy = folder / "one.mlpackage"
    shutil.copytree(package, copy)
    data = bytearray((copy / WEIGHTS).read_bytes())
    change(data)
    (copy / WEIGHTS).write_bytes(bytes(data))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.__setitem__(slice(64, 68), b"none"), "there is none"),
        (lambda d: d.__setitem__(slice(68, 72), struct.pack("<I", 2)), "holds float32, the program says float16"),
        (lambda d: d.__setitem__(slice(72, 80), struct.pack("<Q", 6)), "6 of 1024 bytes"),
        (lambda d: d.__delitem__(slice(200, None)), "from 128 of 200"),
        (lambda d: d.clear(), "cannot be read"),
    ],
    ids=["no blob", "type", "size", "short", "empty"],
)
def test_a_damaged_weight_file(package: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(LoweringError, match=rf"^'one\.mlpackage': function 'main', operator .*{message}"):
        CoreMLEngine(damaged(package, tmp_path, change), [], [])


def test_no_package_at_all(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"^'no\.mlpackage': no package: there is no '.*Manifest\.json'"):
        CoreMLEngine(tmp_path / "no.mlpackage", [], [])


@pytest.mark.parametrize("file", ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"])
def test_a_damaged_package(package: Path, tmp_path: Path, file: str) -> None:
    copy = damaged(package, tmp_path, lambda _: None)
    (copy / file).write_bytes((copy / file).read_bytes()[:-10])
    with pytest.raises(LoweringError, match=r"^'one\.mlpackage': cannot be read as a package: ") as e:
        CoreMLEngine(copy, [], [])
    assert "\n" not in str(e.value)


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    spec = ct.proto.Model_pb2.Model(specificationVersion=4)
    spec.neuralNetwork.SetInParent()
    ct.utils.save_spec(spec, str(tmp_path / "net.mlpackage"))
    with pytest.raises(LoweringError, match="is a neuralNetwork model, not an ML program; convert it to one"):
        CoreMLEngine(tmp_path / "net.mlpackage", [], [])
