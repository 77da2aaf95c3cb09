"""Thin matrices beside integers: what they gain, degenerate weights, refusals, and artifacts that compute with them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import onnx
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from onnx import numpy_helper
from support import Decoded
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import toolchain
from targets.coreml import CoreMLTarget
from targets.coreml.schema import read_model
from targets.executorch import ExecuTorchTarget
from targets.onnx import OnnxTarget
from toolchain.errors import LoweringError, SoraCompileError
from toolchain.formats.recipe_file import load_recipe
from toolchain.ir.affine import Affine
from toolchain.ir.blocks import Block, Port, Signature
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.residual import LEFT, RIGHT, LowRank, thin
from toolchain.ir.storage import FLOAT32, Storage
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Target, UnsupportedStorageError, unique_weights
from toolchain.ir.weights import Weight, WeightSource
from toolchain.planning.plan import plan

F16 = DTYPES["float16"]
INT4 = Affine(4, 32, scale=F16)
STORAGES = [LowRank(INT4, 4), LowRank(Affine(8, symmetric=False), 3), LowRank(Affine(4, 16, clip="error"), 1)]
RANKED = "transformer.passes=[token-merge, {quantize: {scheme: int4, rank: 4}}, partition]"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def structured() -> torch.Tensor:
    """A few strong directions, as trained weights have them, in noise."""
    return random(96, 3) @ random(3, 128, seed=1) + 0.1 * random(96, 128, seed=2)


def error(storage: Storage, weight: torch.Tensor) -> float:
    return float((storage.decode(storage.encode(weight)) - weight).norm() / weight.norm())


# --- the storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_what_is_encoded_is_what_was_promised(storage: LowRank) -> None:
    zeros, equal = torch.zeros(16, 64), random(1, 64).expand(16, 64)
    outlier = random(16, 64)
    outlier[2, 5], outlier[3] = 3e4, 0.0
    for weight in (random(16, 64), random(64, 32), zeros, equal, outlier, 1e-30 * random(16, 64), zeros + 0.5):
        parts = storage.encode(weight)
        promised = [(p.name, p.shape, p.dtype.torch) for p in storage.parts(weight.shape)]
        assert [(name, tuple(value.shape), value.dtype) for name, value in parts.items()] == promised
        assert all(bool(torch.isfinite(part.float()).all()) for part in parts.values())
        assert storage.decode(parts).dtype is torch.float32
        again = storage.encode(weight)
        assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert torch.equal(storage.decode(storage.encode(zeros)), zeros)


def test_it_gains() -> None:
    assert error(LowRank(INT4, 4), structured()) < 0.8 * error(INT4, structured())
    errors = [error(LowRank(INT4, rank), random(96, 128)) for rank in (1, 8, 32, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < error(INT4, random(96, 128))


def test_thin_matrices_are_the_best_of_their_rank() -> None:
    weight = structured()
    left, right = thin(weight, 3)
    sizes = torch.linalg.svdvals(weight.double())
    assert float((weight - left @ right).norm()) == pytest.approx(float(sizes[3:].norm()), rel=1e-6)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    torch.testing.assert_close(left.norm(dim=0), sizes[:3].sqrt(), rtol=1e-6, atol=0)


def test_bytes_and_names() -> None:
    shape = (1152, 4608)
    storage = LowRank(Affine(4, 32, scale=F16), 16)
    assert storage.name == "int4-block32-rank16-f16"
    assert storage.bytes(shape) == storage.main.bytes(shape) + 2 * 16 * (1152 + 4608)
    assert LowRank(Affine(8), 4).name == "int8-rank4-f32"


def test_what_it_is_not_for() -> None:
    assert LowRank(INT4, 16).refusal((64, 64)) is None
    assert LowRank(INT4, 64).refusal((128, 64)) == (
        "a product of rank 64 is no smaller than its 128 rows and 64 columns"
    )
    assert "stands beside matrices alone" in str(LowRank(INT4, 4).refusal((16, 32, 3, 3)))
    assert "blocks of 32" in str(LowRank(INT4, 4).refusal((16, 33)))


def test_what_is_not_finite_is_refused() -> None:
    weight = Weight(WeightSource(("a",), (16, 64)), STORAGES[0])
    values = random(16, 64)
    values[1, 1] = float("nan")
    with pytest.raises(LoweringError, match="weight 'a'"):
        StoredParts({"a": weight}, {"a": values})["a:left"]


def test_weights_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = LowRank.encode
    monkeypatch.setattr(LowRank, "encode", lambda self, weight: calls.append(self) or encode(self, weight))
    parts = StoredParts({"a": Weight(WeightSource(("a",), (16, 64)), STORAGES[0])}, {"a": random(16, 64)})
    assert list(parts) == ["a:values", "a:scale", "a:left", "a:right"]
    assert len(dict(parts)) == 4
    assert len(calls) == 1


# --- artifacts ---------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two layers, one of them called twice, and one whose result is the block's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 48, bias=False)

    def forward(self, x: Any) -> Any:
        return (self.last(self.first(self.first(x).relu())),)


class Merged(Layers):
    """The same layers, otherwise put together."""

    def forward(self, x: Any) -> Any:
        return (self.last(self.first(x).relu()),)


def block_of(storage: Storage) -> Block:
    port, functions = Port("x", (2, 5, 64)), {}
    for name, module in {"base": Layers(), "merged": Merged()}.items():
        functions[name] = fx.symbolic_trace(module)
        ShapeProp(functions[name]).propagate(torch.zeros(port.shape))
    weights = {
        name: Weight(WeightSource((name,), tuple(p.shape)), storage if p.dim() > 1 else FLOAT32)
        for name, p in Layers().named_parameters()
    }
    signatures = dict.fromkeys(functions, Signature((port,), (Port("out", (2, 5, 48)),)))
    return Block("test", "layers", "step", functions, signatures, {}, weights)


def files(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


def hold_numbers(target: Target, block: Block, path: Path, weights: Mapping[str, torch.Tensor], limit: float) -> None:
    engine, x = target.engine(path, block.inputs, block.outputs), random(2, 5, 64)
    for function in block.functions:
        with torch.no_grad():
            (expected,) = block.module(function, Decoded(block.weights, weights))(x)
        (found,) = engine(function, {"x": x}).values()
        assert float((found - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize(
    ("target", "limit", "storage"),
    [
        pytest.param(CoreMLTarget(), 2e-3, LowRank(Affine(4, 32, symmetric=False), 8), id="coreml"),
        pytest.param(CoreMLTarget(), 2e-3, LowRank(Affine(8), 5), id="coreml-channel", marks=pytest.mark.slow),
        pytest.param(OnnxTarget(), 1e-5, LowRank(Affine(4, 32, symmetric=False), 8), id="onnx"),
        pytest.param(OnnxTarget(), 1e-5, LowRank(Affine(8), 5), id="onnx-channel", marks=pytest.mark.slow),
    ],
)
def test_stamped_is_direct(target: Target, limit: float, storage: LowRank, tmp_path: Path) -> None:
    block = block_of(target.keep(storage, "linear"))
    unique, weights = unique_weights(block), {n: 0.2 * w for n, w in unique_weights(block, 7).items()}
    direct = target.lower(block, weights, tmp_path / f"direct{target.suffix}")
    target.check(direct.path, block)
    hold_numbers(target, block, direct.path, weights, limit)
    lowered = target.lower(block, unique, tmp_path / f"template{target.suffix}")
    template = target.bind(lowered, StoredParts(block.weights, unique))
    parts = StoredParts(block.weights, weights)
    stamped = target.stamp(template, parts, tmp_path / f"stamped{target.suffix}")
    assert files(stamped.path) == files(direct.path)
    # what lowering would simplify is stamped all the same
    flat = {n: torch.zeros_like(w) if n.startswith("first") else w[:1].expand_as(w) for n, w in weights.items()}
    odd = target.stamp(template, StoredParts(block.weights, flat), tmp_path / f"odd{target.suffix}")
    target.check(odd.path, block)


def held_by_coremltools(path: Path) -> list[np.ndarray]:
    """The constants of a package's functions and what it decompresses, as coremltools has them."""
    spec, folder = read_model(path)
    proto = ct.proto.Model_pb2.Model.FromString(spec.SerializeToString())
    program = load_program(proto, proto.specificationVersion, file_weights_dir=str(folder / "weights"))
    found: list[np.ndarray] = []
    for function in program.functions.values():
        for op in function.operations:
            if op.op_type.startswith("constexpr_"):
                found.append(op.materialized_val_inference())
            elif op.op_type == "const" and isinstance(op.val.val, np.ndarray):
                found.append(op.val.val)
    return found


def held_by_onnx(path: Path) -> list[np.ndarray]:
    """The tensors of a model, as onnx reads them; integers with a scale a channel are multiplied by it."""
    graph = onnx.load(str(path / "base.onnx")).graph
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    scaled = [[held[i] for i in node.input[:2]] for node in graph.node if node.op_type == "DequantizeLinear"]
    return [*held.values(), *(values.astype(np.float32) * scale.reshape(-1, 1) for values, scale in scaled)]


@pytest.mark.parametrize(
    ("target", "read"),
    [(CoreMLTarget(), held_by_coremltools), (OnnxTarget(), held_by_onnx)],
    ids=["coreml", "onnx"],
)
def test_others_read_what_the_storage_says(target: Target, read: Any, tmp_path: Path) -> None:
    """Thin matrices, and what the integers beside them stand for, bit for bit."""
    block = block_of(target.keep(LowRank(Affine(8), 5), "linear"))
    weights = {n: 0.2 * w for n, w in unique_weights(block, 7).items()}
    found = read(target.lower(block, weights, tmp_path / f"direct{target.suffix}").path)
    for name, weight in block.weights.items():
        if isinstance(weight.storage, LowRank):
            parts = weight.storage.encode(weights[name])
            thin_ones = {part: parts[part] for part in (LEFT, RIGHT)}
            main = weight.storage.main.decode({p: v for p, v in parts.items() if p not in thin_ones})
            for what, expected in (*thin_ones.items(), ("integers", main)):
                array = expected.numpy()
                alike = [f for f in found if f.shape == array.shape and f.dtype.kind == "f"]
                assert any(np.array_equal(f, array.astype(f.dtype)) for f in alike), f"{name}: {what}"


# --- recipes -----------------------------------------------------------------------------------------


def test_scales_are_of_the_targets_type() -> None:
    assert CoreMLTarget().keep(STORAGES[1], "linear").name == "int8-asymmetric-rank3-f16"
    assert OnnxTarget().keep(STORAGES[0], "linear").name == "int4-block32-rank4-f32"


@pytest.mark.parametrize("target", [CoreMLTarget(), OnnxTarget()], ids=["coreml", "onnx"])
@pytest.mark.parametrize("use", ["convolution", "embedding", "other"])
def test_linear_layers_alone(target: Target, use: Any) -> None:
    with pytest.raises(UnsupportedStorageError):
        target.keep(STORAGES[0], use)


def test_executorch_refuses() -> None:
    with pytest.raises(UnsupportedStorageError):
        ExecuTorchTarget().keep(STORAGES[0], "linear")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (RANKED.replace("rank: 4", "rank: 512"), "but a product of rank 512 is no smaller than its"),
        (RANKED.replace("rank: 4", "rank: 0"), "rank"),
        (RANKED.replace("int4", "palette"), "'rank' is no option of the scheme palette"),
        (
            RANKED.replace("rank: 4", "rules: [{match: '*.patch_embed.*', scheme: int8, rank: 4}]"),
            "a product of rank 4 stands beside matrices alone",
        ),
    ],
    ids=["too large", "none", "a palette", "a convolution"],
)
def test_refusals(project: Path, asked: str, said: str) -> None:
    with pytest.raises(SoraCompileError) as refused:
        plan(load_recipe(project / "recipe.yaml", ["target=onnx", asked]), base=project)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True])
def test_a_build_passes_the_gate(project: Path, tmp_path: Path, direct: bool) -> None:
    recipe = load_recipe(
        project / "recipe.yaml", ["target=onnx", RANKED, "gate.max_quantization_error.transformer=0.5"]
    )
    bundle = toolchain.compile_recipe(recipe, tmp_path / "out", base=project, direct=direct)
    (pair,) = (b for b in bundle.manifest.components["transformer"].blocks if b.name == "pair_0")
    assert "int4-block32-rank4-f32" in pair.quantized.values()
    assert pair.accuracy is not None
    assert max(a.relative_error for a in pair.accuracy.values()) < 1e-5


def test_storages_of_equal_kind_are_equal() -> None:
    assert LowRank(INT4, 4) == LowRank(dataclasses.replace(INT4), 4)
