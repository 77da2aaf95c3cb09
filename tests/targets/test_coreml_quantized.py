"""Quantized weights in Core ML packages: what is stored, what it decodes to, and that stamping writes the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from support import Decoded
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from targets.coreml import CoreMLConfig, CoreMLTarget
from targets.coreml.dtypes import DTYPES as STORED
from targets.coreml.program import read_program
from targets.coreml.schema import read_model
from targets.coreml.stamp import WEIGHTS
from targets.coreml.values import Constant, unpack
from targets.packing import pack
from toolchain.errors import LoweringError
from toolchain.ir.affine import Affine
from toolchain.ir.blocks import Block, Port, Signature
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.palette import BITS, Palette
from toolchain.ir.storage import BFLOAT16, FLOAT16, FLOAT32, Narrow, Storage
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Artifact, Template, UnboundTemplateError, UnsupportedStorageError, unique_weights
from toolchain.ir.weights import Weight, WeightSource

pytestmark = pytest.mark.slow

STORAGES: tuple[Storage, ...] = (
    Affine(8),
    Affine(8, symmetric=False),
    Affine(8, block=16, clip="error"),
    Affine(4, block=32),
    Affine(4, block=32, symmetric=False),
    *(Palette(bits) for bits in BITS),
    Palette(4, group=8),
    Palette(3, group=4),
)
EACH = [pytest.param(s, id=str(s)) for s in STORAGES]
HALVES = Narrow(DTYPES["float16"])
LIMITS = {"float16": 2e-3, "float32": 1e-5}
DECOMPRESSED = ("constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "constexpr_cast")
INPUTS = {"x": (2, 5, 64), "z": (1, 32, 6, 6), "v": (1, 32, 3, 4, 4), "ids": (7,)}
MATRICES = ("fc.weight", "conv.weight", "video.weight", "table.weight")

# --- a block of every operator that takes a quantized weight -----------------------------------------


class Four(nn.Module):
    """A linear layer, convolutions of images and of videos, and a table that is looked up."""

    def __init__(self, merged: bool = False) -> None:
        super().__init__()
        self.merged = merged
        self.fc = nn.Linear(64, 48)
        self.conv = nn.Conv2d(32, 16, 3, padding=1)
        self.video = nn.Conv3d(32, 16, (1, 3, 3))
        self.table = nn.Embedding(40, 64)

    def forward(self, x: Any, z: Any, v: Any, ids: Any) -> Any:
        x = x.relu() if self.merged else x
        return self.fc(x), self.conv(z), self.video(v), self.table(ids)


def block_of(
    module: nn.Module, inputs: Mapping[str, Any], storages: Mapping[str, Storage], **others: nn.Module
) -> Block:
    """A block of one module; ``others`` are further functions' modules, of the same weights."""
    functions, signatures = {}, {}
    for function, own in {"base": module, **others}.items():
        gm = fx.symbolic_trace(own)
        values = [torch.zeros(s, dtype=torch.int32 if n == "ids" else torch.float32) for n, s in inputs.items()]
        results = module(*values)
        results = results if isinstance(results, tuple) else (results,)
        outputs = tuple(Port(f"out{i}", tuple(r.shape)) for i, r in enumerate(results))
        ports = tuple(Port(n, tuple(v.shape), v.dtype) for n, v in zip(inputs, values, strict=True))
        if len(results) == 1:  # blocks always give tuples
            (output,) = (n for n in gm.graph.nodes if n.op == "output")
            output.args = ((output.args[0],),)
            gm.recompile()
        ShapeProp(gm).propagate(*values)
        functions[function], signatures[function] = gm, Signature(ports, outputs)
    weights = {
        name: Weight(WeightSource((name,), tuple(p.shape)), storages.get(name, FLOAT32))
        for name, p in module.named_parameters()
    }
    return Block("test", "four", "step", functions, signatures, {}, weights)


def four(storage: Storage, precision: str = "float16", merged: bool = False) -> tuple[CoreMLTarget, Block]:
    """The target, and the block with its four matrices kept as the target keeps ``storage``."""
    others = {"merged": Four(merged=True)} if merged else {}
    target = CoreMLTarget(CoreMLConfig(precision=precision))  # type: ignore[arg-type]
    kept = target.keep(storage, "linear")
    return target, block_of(Four(), INPUTS, dict.fromkeys(MATRICES, kept), **others)


def trained(block: Block, seed: int = 5) -> dict[str, torch.Tensor]:
    """Weights of a layer's usual size."""
    return {name: 0.2 * value for name, value in unique_weights(block, seed).items()}


def degenerate(block: Block) -> dict[str, torch.Tensor]:
    """A channel of zeros, one outlier, two equal channels, one channel of a single number."""
    weights = trained(block, 6)
    for value in (weights[name] for name in MATRICES):
        value[0] = 0
        value[1].view(-1)[3] = 100.0
        value[3] = value[2]
        value[4] = -0.25
    return weights


def given_to(block: Block, function: str = "base") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        p.name: torch.randn(p.shape, generator=generator)
        if p.dtype.is_floating_point
        else torch.randint(0, 40, p.shape, generator=generator, dtype=p.dtype)
        for p in block.signatures[function].inputs
    }


def hold_numbers(target: CoreMLTarget, block: Block, path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Every function computes what PyTorch does with decoded weights."""
    engine = target.engine(path, block.inputs, block.outputs)
    for function in block.functions:
        inputs = given_to(block, function)
        with torch.no_grad():
            expected = block.module(function, Decoded(block.weights, weights))(*inputs.values())
        found = engine(function, inputs)
        for port, value in zip(block.outputs, expected, strict=True):
            error = float((found[port.name] - value).norm() / value.norm())
            assert error < LIMITS[target.precision], (function, port.name, error)


def files(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


def bound(target: CoreMLTarget, block: Block, folder: Path, seed: int = 3) -> Template:
    unique = unique_weights(block, seed)
    artifact = target.lower(block, unique, folder / "template.mlpackage")
    template = target.bind(artifact, StoredParts(block.weights, unique))
    return Template(template.artifact, json.loads(json.dumps(template.slots)), template.constants)


Lowered = tuple[CoreMLTarget, Block, dict[str, torch.Tensor], Artifact]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Storage], Lowered]:
    """A block with trained weights, lowered once for each storage."""

    @functools.cache
    def make(storage: Storage) -> Lowered:
        target, block = four(storage)
        weights = trained(block)
        artifact = target.lower(block, weights, tmp_path_factory.mktemp("lowered") / "a.mlpackage")
        return target, block, weights, artifact

    return make


# --- what is stored, and what it means ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "precision"),
    [
        pytest.param(s, p, id=f"{s}-{p}")
        for p, storages in (("float16", STORAGES), ("float32", (HALVES, STORAGES[1], STORAGES[3], STORAGES[-1])))
        for s in storages
    ],
)
def test_lowered_computes_what_is_decoded(
    storage: Storage, precision: str, lowered: Callable[[Storage], Lowered], tmp_path: Path
) -> None:
    if precision == "float16":
        target, block, weights, artifact = lowered(storage)
    else:
        target, block = four(storage, precision)
        weights = trained(block)
        artifact = target.lower(block, weights, tmp_path / "a.mlpackage")
    target.check(artifact.path, block)
    hold_numbers(target, block, artifact.path, weights)
    # whatever reads the package: coremltools' own definition gives the decoded numbers, in the precision
    spec, folder = read_model(artifact.path)
    model = ct.proto.Model_pb2.Model.FromString(spec.SerializeToString())
    program = load_program(model, model.specificationVersion, file_weights_dir=str(folder / "weights"))
    (function,) = program.functions.values()
    values = [op.materialized_val_inference() for op in function.operations if op.op_type in DECOMPRESSED]
    decoded = Decoded(block.weights, weights)
    assert len(values) == len(MATRICES)
    for name in MATRICES:
        (value,) = (v for v in values if v.shape == tuple(block.weights[name].shape))
        assert value.dtype == getattr(np, precision)
        np.testing.assert_array_equal(value, decoded[name].numpy().astype(value.dtype))
    # and the engine gives them too, number by number
    engine = target.engine(artifact.path, block.inputs, block.outputs)
    traced = [v for v in engine.trace("base", given_to(block)) if v.op in DECOMPRESSED]  # type: ignore[attr-defined]
    for name in MATRICES:
        (found,) = (v.value for v in traced if v.value.shape == block.weights[name].shape)
        assert torch.equal(found, decoded[name].to(getattr(torch, precision)).float())


@pytest.mark.parametrize("storage", EACH)
def test_weights_take_as_many_bits_as_they_say(storage: Storage, lowered: Callable[[Storage], Lowered]) -> None:
    _, block, _, artifact = lowered(storage)
    stored = (artifact.path / WEIGHTS).stat().st_size
    plain = sum(2 * w.parameters for w in block.weights.values() if w.storage == FLOAT32)
    kept = sum(w.bytes for w in block.weights.values() if w.storage != FLOAT32)
    parts = len(list(StoredParts(block.weights, {})))
    assert stored <= kept + plain + 64 + 128 * parts
    (function,) = read_program(artifact.path).values()
    expected = {Affine: "int", Palette: "uint"}[type(storage)] + str(storage.bits)  # type: ignore[attr-defined]
    part = "data" if isinstance(storage, Affine) else "indices"
    data = [op.arguments[part] for op in function.operations if op.type in DECOMPRESSED]
    assert [d.dtype.name for d in data if isinstance(d, Constant)] == [expected] * len(MATRICES)


@pytest.mark.parametrize("storage", [Affine(4, block=32), Palette(6, group=8), Palette(2)], ids=str)
def test_functions_share_what_is_stored(storage: Storage, tmp_path: Path) -> None:
    target, block = four(storage, merged=True)
    weights = trained(block)
    both = target.lower(block, weights, tmp_path / "both.mlpackage")
    assert both.functions == ("base", "merged")
    _, alone = four(storage)
    one = target.lower(alone, weights, tmp_path / "one.mlpackage")
    assert (both.path / WEIGHTS).read_bytes() == (one.path / WEIGHTS).read_bytes()
    target.check(both.path, block)
    hold_numbers(target, block, both.path, weights)


# --- stamping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", EACH)
def test_stamped_is_direct_byte_for_byte(
    storage: Storage, lowered: Callable[[Storage], Lowered], tmp_path: Path
) -> None:
    target, block, weights, direct = lowered(storage)
    template = bound(target, block, tmp_path)
    stamped = target.stamp(template, StoredParts(block.weights, weights), tmp_path / "stamped.mlpackage")
    assert files(stamped.path) == files(direct.path)
    worst = degenerate(block)
    stamped = target.stamp(template, StoredParts(block.weights, worst), tmp_path / "worst.mlpackage")
    assert files(stamped.path) == files(target.lower(block, worst, tmp_path / "direct.mlpackage").path)
    hold_numbers(target, block, stamped.path, worst)


@pytest.mark.parametrize("storage", [Affine(4, block=32), Palette(6, group=8)], ids=str)
def test_stamped_functions_are_direct_byte_for_byte(storage: Storage, tmp_path: Path) -> None:
    target, block = four(storage, merged=True)
    template, weights = bound(target, block, tmp_path), degenerate(block)
    stamped = target.stamp(template, StoredParts(block.weights, weights), tmp_path / "stamped.mlpackage")
    direct = target.lower(block, weights, tmp_path / "direct.mlpackage")
    assert stamped.functions == direct.functions
    assert files(stamped.path) == files(direct.path)
    hold_numbers(target, block, stamped.path, weights)


def test_templates_hold_no_weights(tmp_path: Path) -> None:
    for storage in (Affine(4, block=32, symmetric=False), Palette(3)):
        folder = tmp_path / storage.name
        folder.mkdir()
        target, block = four(storage)
        template = bound(target, block, folder)
        assert {slot["weight"] for slot in template.slots} == set(StoredParts(block.weights, {}))
        left = (template.artifact.path / WEIGHTS).read_bytes()
        assert len(left) < 64 + 128 * len(template.slots)


def test_parts_are_encoded_once_for_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of few numbers stand in another file than their places; k-means is not run for each."""
    target, block = four(Palette(2))
    template = bound(target, block, tmp_path)
    encoded = []
    before = Palette.encode
    monkeypatch.setattr(Palette, "encode", lambda self, w: encoded.append(tuple(w.shape)) or before(self, w))
    target.stamp(template, StoredParts(block.weights, trained(block)), tmp_path / "stamped.mlpackage")
    assert sorted(encoded) == sorted(tuple(block.weights[n].shape) for n in MATRICES)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    target, block = four(Affine(8))
    template = bound(target, block, tmp_path)
    weights = trained(block)
    weights["conv.weight"][1, 2] = float("nan")
    for make in (
        lambda: target.stamp(template, StoredParts(block.weights, weights), tmp_path / "s.mlpackage"),
        lambda: target.lower(block, weights, tmp_path / "d.mlpackage"),
    ):
        with pytest.raises(LoweringError, match=r"weight 'conv\.weight' has numbers that are NaN or infinite"):
            make()


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("storage", [Affine(8, symmetric=False), Affine(4, symmetric=False), Palette(1)], ids=str)
def test_small_parts_stand_in_the_program(storage: Storage, precision: str, tmp_path: Path) -> None:
    """And are told apart by the weight that their operator decompresses, for many are equal."""
    target = CoreMLTarget(CoreMLConfig(precision=precision))  # type: ignore[arg-type]
    kept = target.keep(storage, "linear")
    layers = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64), nn.Linear(64, 4), nn.Linear(4, 5))
    block = block_of(layers, {"x": (2, 64)}, {f"{i}.weight": kept for i in range(4)})
    template = bound(target, block, tmp_path)
    assert [s for s in template.slots if s["weight"] == "2.weight:zero"] or storage == Palette(1)
    weights = trained(block)
    weights["2.weight"] = weights["2.weight"].abs()
    stamped = target.stamp(template, StoredParts(block.weights, weights), tmp_path / "stamped.mlpackage")
    assert files(stamped.path) == files(target.lower(block, weights, tmp_path / "direct.mlpackage").path)
    hold_numbers(target, block, stamped.path, weights)


def test_equal_tables_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Palette.encode
    table = torch.tensor([[-1.0, 1.0]], dtype=torch.float16)
    monkeypatch.setattr(Palette, "encode", lambda self, w: {**before(self, w), "table": table})
    target, block = four(Palette(1))
    template = bound(target, block, tmp_path)
    monkeypatch.undo()
    weights = trained(block)
    stamped = target.stamp(template, StoredParts(block.weights, weights), tmp_path / "stamped.mlpackage")
    assert files(stamped.path) == files(target.lower(block, weights, tmp_path / "direct.mlpackage").path)


def test_parts_that_are_not_found(tmp_path: Path) -> None:
    target, block = four(Affine(4, block=32))
    artifact = target.lower(block, trained(block), tmp_path / "a.mlpackage")
    with pytest.raises(UnboundTemplateError, match=r"weight 'conv\.weight:values': 0 of 4608 elements are in"):
        target.bind(artifact, StoredParts(block.weights, trained(block) | {"conv.weight": torch.randn(16, 32, 3, 3)}))


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_what_the_target_keeps(precision: str) -> None:
    target = CoreMLTarget(CoreMLConfig(precision=precision))  # type: ignore[arg-type]
    number, own = DTYPES[precision], target.storage
    for storage in STORAGES:
        field = "scale" if isinstance(storage, Affine) else "number"
        for use in ("linear", "convolution", "embedding"):
            assert target.keep(storage, use) == dataclasses.replace(storage, **{field: number})  # type: ignore[arg-type,type-var]
        with pytest.raises(UnsupportedStorageError, match=f"^it takes {own}$"):
            target.keep(storage, "other")
    assert target.keep(own, "linear") == target.keep(own, "other") == own
    for other in {FLOAT16, FLOAT32, BFLOAT16} - {own}:
        with pytest.raises(UnsupportedStorageError) as error:
            target.keep(other, "linear")
        plain = "float32, float16" if own == FLOAT32 else own
        assert str(error.value) == f"it takes {plain}, int8, int4 and palettes of 1, 2, 3, 4, 6, 8 bits"


def test_float16_is_for_what_is_computed_in_float32(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStorageError):
        CoreMLTarget().keep(HALVES, "linear")
    target, block = four(HALVES, "float32")
    template, weights = bound(target, block, tmp_path), degenerate(block)
    stamped = target.stamp(template, StoredParts(block.weights, weights), tmp_path / "stamped.mlpackage")
    assert files(stamped.path) == files(target.lower(block, weights, tmp_path / "direct.mlpackage").path)
    hold_numbers(target, block, stamped.path, weights)
    numbers = sum(w.parameters for n, w in block.weights.items() if n in MATRICES)
    assert (stamped.path / WEIGHTS).stat().st_size < 2 * numbers + 4 * 200 + 128 * len(template.slots)
    weights["fc.weight"][0, 0] = 7e4
    with pytest.raises(LoweringError, match=r"weight 'fc\.weight"):
        target.stamp(template, StoredParts(block.weights, weights), tmp_path / "large.mlpackage")


class Twice(nn.Module):
    """A matrix that is used as it is and, by another operator, transposed."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.fc, self.both = nn.Linear(64, 64, bias=False), both

    def forward(self, x: Any) -> Any:
        turned = torch.nn.functional.linear(x, self.fc.weight.transpose(0, 1) * 2)
        return (self.fc(x) + turned,) if self.both else (turned,)


@pytest.mark.parametrize(("both", "said"), [(True, "1 of the 2 operators"), (False, "has no constant that is it")])
def test_weights_that_are_not_used_as_they_are(both: bool, said: str, tmp_path: Path) -> None:
    target = CoreMLTarget()
    kept = target.keep(Affine(8), "linear")
    block = block_of(Twice(both), {"x": (2, 64)}, {"fc.weight": kept})
    with pytest.raises(LoweringError, match=f"function 'base': .*weight 'fc.weight'.*{said}"):
        target.lower(block, trained(block), tmp_path / "a.mlpackage")


def test_other_conversions_are_left_alone(tmp_path: Path) -> None:
    """The pass is of one conversion: a block without quantized weights is lowered as before and after."""
    target, block = four(Affine(8))
    plain = block_of(Four(), INPUTS, {})
    weights = trained(block)
    made: list[Artifact] = []
    for name in ("before", "after"):
        made.append(target.lower(plain, weights, tmp_path / f"{name}.mlpackage"))
        target.lower(block, weights, tmp_path / f"{name}-int8.mlpackage")
    assert files(made[0].path) == files(made[1].path)
    assert files(tmp_path / "before-int8.mlpackage") == files(tmp_path / "after-int8.mlpackage")


# --- packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uint1", "uint2", "uint3", "uint4", "uint6", "uint8", "int4", "int8"])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, (1 << 17) + 5])
def test_packed_numbers_are_unpacked(name: str, count: int) -> None:
    dtype = STORED[name]
    low = -(1 << (dtype.bits - 1)) if dtype.is_signed else 0
    held = torch.int8 if dtype.is_signed else torch.uint8
    values = torch.randint(low, low + (1 << dtype.bits), (count,), generator=torch.Generator().manual_seed(count))
    packed = pack(values.to(held), dtype.bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count * dtype.bits // 8)
    assert torch.equal(unpack(packed.numpy().copy(), dtype, count), values.to(held))
