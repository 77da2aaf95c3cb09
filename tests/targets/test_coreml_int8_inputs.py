"""Linear layers that round what comes in, in Core ML packages: the pattern, stamping of scales, exact products."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import results
from support import Decoded, relative
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.coreml.engine import CoreMLEngine
from targets.coreml.integers import EXACT, integer_linear, integer_product
from targets.coreml.program import read_program
from targets.coreml.schema import read_model
from targets.coreml.stamp import WEIGHTS
from toolchain.ir.activations import LEAST_SCALE, RoundedLinear, ScaleSource, function_with, rounded_layers
from toolchain.ir.affine import Affine
from toolchain.ir.blocks import Block, Port, Signature
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Template, distinct_functions, unique_weights
from toolchain.ir.weights import Weight, WeightSource

pytestmark = pytest.mark.slow

FUNCTIONS = ("base", "base_2")


class Layers(nn.Module):
    """Three linear layers, of which the second is wide and the third has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.last = nn.Linear(32, 48), nn.Linear(48, 1100), nn.Linear(1100, 16, bias=False)

    def forward(self, x: Any) -> Any:
        return (self.last(torch.tanh(self.wide(torch.relu(self.first(x))))),)


def layers(
    precision: str = "float16", rounding: tuple[str, ...] = ("first", "wide", "last")
) -> tuple[CoreMLTarget, Block]:
    """The target, and a block of two functions whose ``rounding`` layers have a scale in each."""
    target = CoreMLTarget(CoreMLConfig(precision=precision))  # type: ignore[arg-type]
    plain, x = fx.symbolic_trace(Layers()), torch.zeros(2, 5, 32)
    ShapeProp(plain).propagate(x)
    weights = {n: Weight(WeightSource((n,), tuple(p.shape)), target.storage) for n, p in plain.named_parameters()}
    functions = {}
    for function in FUNCTIONS:

        def change(_: fx.Node, path: str, layer: nn.Linear, function: str = function) -> nn.Linear:
            return RoundedLinear(layer, function) if path in rounding else layer

        functions[function] = function_with(plain, change)
        for weight, scale in rounded_layers(functions[function]).items():
            source = ScaleSource((f"{weight}/{function}",), (), layer=weights[weight].source, function=function)
            weights[scale] = Weight(source, target.storage)
    kept = target.keep(Affine(8), "linear")
    for name in ("first.weight", "wide.weight", "last.weight"):
        weights[name] = dataclasses.replace(weights[name], storage=kept)
    signature = Signature((Port("x", (2, 5, 32)),), (Port("y", (2, 5, 16)),))
    return target, Block("test", "layers", "step", functions, dict.fromkeys(FUNCTIONS, signature), {}, weights)


def trained(block: Block, scales: Mapping[str, float] | None = None) -> dict[str, torch.Tensor]:
    """Weights of a usual size; scales by the name of the layer's weight and the function."""
    weights = {n: 0.2 * w for n, w in unique_weights(block, 5).items()}
    for function, gm in block.functions.items():
        for number, scale in enumerate(rounded_layers(gm).values()):
            size = (scales or {}).get(scale, 2.0**-5 * (1 + number) * (1 if function == "base" else 3))
            weights[scale] = torch.tensor(size)
    return weights


def files(path: Path) -> dict[str, str]:
    found = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def template(target: CoreMLTarget, block: Block, folder: Path) -> Template:
    unique = unique_weights(block)
    made = target.bind(target.lower(block, unique, folder / "template.mlpackage"), StoredParts(block.weights, unique))
    return Template(made.artifact, json.loads(json.dumps(made.slots)), made.constants)


@functools.cache
def given_x() -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def expected(block: Block, function: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        (value,) = block.module(function, Decoded(block.weights, weights))(given_x())
    return value  # type: ignore[no-any-return]


# --- packages ----------------------------------------------------------------------------------------


def test_stamped_is_direct_byte_for_byte_and_computes_what_pytorch_does(tmp_path: Path) -> None:
    target, block = layers()
    made = template(target, block, tmp_path)
    assert {slot["weight"] for slot in made.slots} == set(StoredParts(block.weights, {}))
    # equal scales, the least one, one of a layer that met nothing but zeros, and a large one
    odd = {n: 0.125 for n in block.weights if "input_scale" in n}
    odd |= {"first.input_scale_base": LEAST_SCALE, "wide.input_scale_base": 1.0, "last.input_scale_base": 512.0}
    for name, scales in {"usual": None, "odd": odd}.items():
        weights = trained(block, scales)
        stamped = target.stamp(made, StoredParts(block.weights, weights), tmp_path / f"{name}.mlpackage")
        direct = target.lower(block, weights, tmp_path / f"{name}-direct.mlpackage")
        assert stamped.functions == direct.functions == FUNCTIONS
        assert files(stamped.path) == files(direct.path)
        target.check(stamped.path, block)
    weights = trained(block)
    engine = target.engine(tmp_path / "usual.mlpackage", block.inputs, block.outputs)
    found = {f: engine(f, {"x": given_x()})["y"] for f in FUNCTIONS}
    for function, value in found.items():
        assert relative(value, expected(block, function, weights)) < 5e-2  # steps of a tenth of the range
        assert relative(value, expected(block, "base" if function != "base" else "base_2", weights)) > 5e-2
    # weights are stored once; two functions differ in the program's file alone
    values = sum(w.bytes for n, w in block.weights.items() if n.endswith("weight"))
    assert (tmp_path / "usual.mlpackage" / WEIGHTS).stat().st_size < values + 8192


def test_the_pattern_is_the_one_that_core_ml_runs_in_integers(tmp_path: Path) -> None:
    """As coremltools' own pass for activations inserts it, with scales of the type of what comes in."""
    target, block = layers(rounding=("wide",))
    weights = trained(block)
    path = target.lower(block, weights, tmp_path / "a.mlpackage").path
    spec, folder = read_model(path)
    model = ct.proto.Model_pb2.Model.FromString(spec.SerializeToString())
    program = load_program(model, model.specificationVersion, file_weights_dir=str(folder / "weights"))
    for function in FUNCTIONS:
        operations = program.functions[function].operations
        (back,) = (op for op in operations if op.op_type == "dequantize")
        (layer,) = back.outputs[0].child_ops
        assert layer.op_type == "linear"
        assert layer.weight.op.op_type == "constexpr_blockwise_shift_scale"
        whole = back.input.op
        assert whole.op_type == "quantize"
        assert whole.output_dtype.val == "int8"
        assert whole.zero_point is None is back.zero_point
        assert whole.scale.val == back.scale.val == weights[f"wide.input_scale_{function}"].item()
        assert whole.scale.dtype == back.scale.dtype == whole.input.dtype
    assert distinct_functions(block) == FUNCTIONS


def test_in_float32_rounding_is_the_same_to_the_last_step(tmp_path: Path) -> None:
    target, block = layers("float32")
    weights = trained(block)
    engine = target.engine(target.lower(block, weights, tmp_path / "a.mlpackage").path, block.inputs, block.outputs)
    for function in FUNCTIONS:
        assert relative(engine(function, {"x": given_x()})["y"], expected(block, function, weights)) < 1e-5
    assert target.arithmetic(block) == "float32"
    assert layers()[0].arithmetic(layers()[1]) == "int8"
    assert layers()[0].arithmetic(layers(rounding=())[1]) == "float16"


def test_products_of_integers_are_one_step(tmp_path: Path) -> None:
    """And what is multiplied so is not computed in another way beside it."""
    target, block = layers(rounding=("first", "last"))
    path = target.lower(block, trained(block), tmp_path / "a.mlpackage").path
    engine = CoreMLEngine(path, block.inputs, block.outputs)
    before = [op.type for op in read_program(path)["base"].operations]
    traced = [v.op for v in engine.trace("base", {"x": given_x()})]
    assert before.count("dequantize") == 2
    assert "dequantize" not in traced
    assert traced.count("constexpr_blockwise_shift_scale") == 1  # of the layer that rounds nothing
    assert traced.count("linear") == before.count("linear") == 3
    native = CoreMLEngine(path, block.inputs, block.outputs, "native")("base", {"x": given_x()})["y"]
    assert relative(native, engine("base", {"x": given_x()})["y"]) < 2e-2


# --- operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("zero", [None, np.int8(3), np.int8(-128)])
def test_rounding_ties_and_ends(dtype: Any, zero: Any, tmp_path: Path) -> None:
    """``clip(round(x / scale) + zero)``, ties to even, as a program declares its numbers."""
    scale = dtype(2.0**-4)
    steps = np.array([-1e4, -129.5, -128.5, -127.5, -2.5, -1.5, -0.5, -0.49, 0, 0.5, 1.5, 126.5, 127.25, 127.5, 1e4])
    x = (steps * 2.0**-4).astype(dtype)
    arguments = {"input": x, "scale": scale, "output_dtype": "int8"} | ({} if zero is None else {"zero_point": zero})
    (found,), (theirs,) = results("quantize", arguments, tmp_path)
    even = np.array([round(float(s)) for s in steps])  # Python rounds ties to even
    wanted = np.clip(even + (0 if zero is None else int(zero)), -128, 127)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(theirs, wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3 * EXACT + 5), st.sampled_from(["ends", "lowest", "random"]), st.integers(0, 2**16))
def test_products_are_exact(columns: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-128, 128, (3, columns), generator=generator, dtype=torch.int8) for _ in range(2))
    if kind != "random":
        x.fill_(-128)
        w.fill_(-128 if kind == "lowest" else 127)
    found = integer_product(x, w)
    assert torch.equal(found.long(), x.long() @ w.long().T)
    scale = torch.tensor([[0.5], [0.25], [2.0]])
    out = integer_linear(x, torch.tensor(0.125), w, scale, torch.ones(3))
    assert torch.allclose(out.double(), found.double() * scale[:, 0].double() / 8 + 1, rtol=1e-6)
