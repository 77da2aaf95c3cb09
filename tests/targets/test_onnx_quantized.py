"""ONNX models with quantized weights: what is stored, what is computed with it, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from support import Decoded, degenerate, relative
from test_executorch import toy_block
from torch import nn

from targets.onnx import OnnxTarget
from targets.onnx import weights as store
from toolchain.errors import LoweringError
from toolchain.ir.affine import Affine
from toolchain.ir.blocks import Block
from toolchain.ir.leaves import Leaf
from toolchain.ir.storage import FLOAT32, Storage
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Artifact, Template, UnboundTemplateError, unique_weights
from toolchain.ir.uses import Use

pytestmark = pytest.mark.slow

TARGET = OnnxTarget()
LIMIT = 1e-5
PER_CHANNEL = {
    "int8": Affine(8),
    "int8-asymmetric": Affine(8, symmetric=False),
    "int4": Affine(4),
    "int4-asymmetric": Affine(4, symmetric=False),
}
IN_BLOCKS = {
    "int4-block32": Affine(4, block=32),
    "int4-block32-asymmetric": Affine(4, block=32, symmetric=False),
    "int4-block16-clip": Affine(4, block=16, clip="error"),
    "int8-block32-asymmetric": Affine(8, block=32, symmetric=False),
    "int8-block16": Affine(8, block=16),
}
STORAGES = PER_CHANNEL | IN_BLOCKS


class Linear(Leaf):
    """160 columns are five blocks of 32, so that the zeros of a row do not fill their bytes."""

    def __init__(self, bias: bool, columns: int = 160) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, 24, bias=bias, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


class Convolution(Leaf):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return out


class Table(Leaf):
    def __init__(self, width: int = 160) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(20, width, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding((x.abs() * 5).clamp(max=19).int(), self.weight)


class Turned(Leaf):
    """A matrix that is used in a way that no operator for blocks knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 64, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Tied(Leaf):
    """A table that is also a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(20, 32, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding((x.abs() * 5).clamp(max=19).int(), self.weight), self.weight)


LEAVES: dict[str, tuple[Any, tuple[int, ...], Use]] = {
    "linear-2d": (lambda: Linear(True), (6, 160), "linear"),
    "linear-3d": (lambda: Linear(True), (2, 3, 160), "linear"),
    "linear-3d-plain": (lambda: Linear(False), (2, 3, 160), "linear"),
    "linear-2d-plain": (lambda: Linear(False), (6, 160), "linear"),
    "conv2d": (lambda: Convolution(nn.Conv2d(5, 7, 3, padding=1, device="meta")), (1, 5, 6, 4), "convolution"),
    "conv3d": (lambda: Convolution(nn.Conv3d(5, 7, 3, bias=False, device="meta")), (1, 5, 4, 5, 6), "convolution"),
    "table": (Table, (2, 7), "embedding"),
}
KEPT: Mapping[str, Mapping[str, Affine]] = {
    "linear": STORAGES,
    "convolution": PER_CHANNEL,
    "embedding": {name: s for name, s in STORAGES.items() if s.bits == 8 or s.block},
}
ALIKE = {
    "linear-3d": "int4-block32",
    "linear-3d-plain": "int8-asymmetric",
    "linear-2d-plain": "int4-block32-asymmetric",
}
"""Leaves that differ from the first in what stands around the product: with one storage each, the first with all."""
CASES = [
    (leaf, storage)
    for leaf, (_, _, use) in LEAVES.items()
    for storage in KEPT[use]
    if leaf not in ALIKE or ALIKE[leaf] == storage
]


def quantized(block: Block, storage: Storage) -> Block:
    """The block with every weight of more than one dimension kept as ``storage``."""
    weights = {n: dataclasses.replace(w, storage=storage) if len(w.shape) > 1 else w for n, w in block.weights.items()}
    return dataclasses.replace(block, weights=weights)


def made(leaf: str, storage: str) -> Block:
    make, shape, use = LEAVES[leaf]
    kept = TARGET.keep(STORAGES[storage], use)
    return quantized(toy_block(make(), *shape), kept)


def inputs_of(block: Block) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(block.inputs[0].shape, generator=torch.Generator().manual_seed(1))}


def eager(block: Block, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the block computes on the numbers that its artifact stands for."""
    with torch.no_grad():
        (result,) = block.module("base", dict(Decoded(block.weights, weights)))(*inputs_of(block).values())
    return result


def content(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def model(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path / "base.onnx"), load_external_data=False)


@dataclass(frozen=True)
class Case:
    """A block with quantized weights, lowered with random ones, and the template of that."""

    block: Block
    unique: Mapping[str, torch.Tensor]
    path: Path
    template: Template
    folder: Path

    def parts(self, weights: Mapping[str, torch.Tensor]) -> StoredParts:
        return StoredParts(self.block.weights, weights)

    def hold(self, path: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """The engine, and ONNX Runtime as it comes, compute with the numbers that the storage decodes to."""
        inputs, expected = inputs_of(self.block), eager(self.block, weights)
        (result,) = TARGET.engine(path, self.block.inputs, self.block.outputs)("base", inputs).values()
        assert result.shape == expected.shape
        assert relative(result, expected) < LIMIT
        plain = onnxruntime.InferenceSession(str(path / "base.onnx"), providers=["CPUExecutionProvider"])
        assert relative(plain.run(None, {"x": inputs["x"].numpy()})[0], expected) < LIMIT


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    @functools.cache
    def make(leaf: str, storage: str) -> Case:
        block, folder = made(leaf, storage), tmp_path_factory.mktemp("case")
        unique = unique_weights(block)
        artifact = TARGET.lower(block, unique, folder / "template")
        path = Path(shutil.copytree(artifact.path, folder / "lowered"))
        template = TARGET.bind(artifact, StoredParts(block.weights, unique))
        return Case(block, unique, path, template, folder)

    return make


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, cases: Callable[[str, str], Case]) -> Case:
    return cases(*request.param)


# --- what is computed and stored ---------------------------------------------------------------------


def test_the_engine_computes_with_what_the_storage_decodes_to(case: Case) -> None:
    TARGET.check(case.path, case.block)
    onnx.checker.check_model(str(case.path / "base.onnx"), full_check=True)
    case.hold(case.path, case.unique)


def test_stamped_is_direct_byte_for_byte(case: Case) -> None:
    again = TARGET.stamp(case.template, case.parts(case.unique), case.folder / "again")
    assert content(again.path) == content(case.path)
    halves = {n: w.half() for n, w in degenerate(unique_weights(case.block, seed=5)).items()}
    stamped = TARGET.stamp(case.template, case.parts(halves), case.folder / "stamped")
    weights = {n: w.float() for n, w in halves.items()}
    assert content(stamped.path) == content(TARGET.lower(case.block, weights, case.folder / "direct").path)
    case.hold(stamped.path, weights)


def test_the_file_has_the_packed_parts_and_no_more(case: Case) -> None:
    outside = store.outside(model(case.path))
    sizes = {t.name: next(int(e.value) for e in t.external_data if e.key == "length") for t in outside}
    assert set(sizes) == set(case.parts({}))
    rows = max(w.shape[0] for w in case.block.weights.values())
    # a byte for each odd row of zeros
    assert case.block.weight_bytes <= sum(sizes.values()) <= case.block.weight_bytes + rows
    assert sum(sizes.values()) <= (case.path / store.FILE).stat().st_size <= sum(sizes.values()) + 4096 * len(sizes)
    assert (case.template.artifact.path / store.FILE).stat().st_size <= 4096 * len(sizes)
    assert not [t for t in model(case.path).graph.initializer if not t.external_data and math.prod(t.dims) > 16]


def test_what_is_bound_is_what_is_stored(cases: Callable[[str, str], Case]) -> None:
    case = cases("linear-2d", "int8")
    block, artifact = case.block, Artifact(case.path, ("base",))
    with pytest.raises(UnboundTemplateError, match=r"weight 'leaf\.linear\.(bias|weight:scale)' is not where"):
        TARGET.bind(artifact, StoredParts(block.weights, unique_weights(block, seed=7)))
    with pytest.raises(UnboundTemplateError, match=r"a model looks for '.*', which is no weight's"):
        TARGET.bind(artifact, {n: w for n, w in case.unique.items() if n.endswith("bias")})


OPERATORS: dict[tuple[str, str], dict[str, int]] = {
    ("linear-2d", "int8"): {"DequantizeLinear": 1, "Gemm": 1},
    ("linear-3d", "int4-block32"): {"Reshape": 2, "MatMulNBits": 1},
    ("conv2d", "int8"): {"DequantizeLinear": 1, "Conv": 1},
}


@pytest.mark.parametrize("which", OPERATORS, ids="-".join)
def test_operators(which: tuple[str, str], cases: Callable[[str, str], Case]) -> None:
    assert Counter(n.op_type for n in model(cases(*which).path).graph.node) == OPERATORS[which]


def test_weights_that_are_expanded_stand_first(tmp_path: Path) -> None:
    """So that ONNX Runtime expands each right before its use, and never all at once."""

    class Chain(Leaf):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(512, 512, device="meta") for _ in range(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + torch.relu(layer(x))
            return x

    block = quantized(toy_block(Chain(), 4, 512), Affine(8))
    weights = {name: w * 0.01 for name, w in unique_weights(block).items()}
    path = TARGET.lower(block, weights, tmp_path / "toy").path
    ops = [n.op_type for n in model(path).graph.node]
    assert ops[:12] == ["DequantizeLinear"] * 12
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path / "base.onnx"), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": inputs_of(block)["x"].numpy()})
    ran = re.findall(r'"op_name" : "(\w+)"', Path(session.end_profiling()).read_text())
    waiting, most = 0, 0
    for op in ran:
        waiting += {"DequantizeLinear": 1, "Gemm": -1, "FusedGemm": -1}.get(op, 0)
        most = max(most, waiting)
    assert most <= 2, ran


def test_trace_shows_what_weights_are_expanded_to(cases: Callable[[str, str], Case]) -> None:
    case = cases("linear-2d", "int8")
    block, weights, path = case.block, case.unique, case.path
    engine = TARGET.engine(path, block.inputs, block.outputs)
    first, last = engine.trace("base", inputs_of(block))  # type: ignore[attr-defined]
    assert (first.op, first.name, last.name) == ("DequantizeLinear", "y_DequantizeLinear", "y")
    assert torch.equal(first.value, Decoded(block.weights, weights)["leaf.linear.weight"])
    assert relative(last.value, eager(block, weights)) < LIMIT


# --- what is refused ---------------------------------------------------------------------------------


def test_a_use_that_cannot_be_rewritten_is_named(tmp_path: Path) -> None:
    block = quantized(toy_block(Turned(), 3, 32), Affine(4, block=32))
    with pytest.raises(LoweringError) as error:
        TARGET.lower(block, unique_weights(block), tmp_path / "toy")
    assert str(error.value) == (
        "block 'toy', function 'base': weight 'leaf.weight' is kept as int4-block32-f32, which operator 'y' (MatMul) "
        "cannot read; keep it as float32"
    )
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize("storage", [Affine(8), Affine(8, block=32)], ids=str)
def test_a_table_that_is_multiplied_too_is_refused(storage: Affine, tmp_path: Path) -> None:
    block = quantized(toy_block(Tied(), 2, 3), storage)
    with pytest.raises(LoweringError, match=r"block 'toy', function 'base': 'leaf\.weight:\w+' is both looked up and"):
        TARGET.lower(block, unique_weights(block), tmp_path / "toy")


def test_a_channel_s_scale_goes_with_any_operator(tmp_path: Path) -> None:
    block = quantized(toy_block(Turned(), 3, 32), Affine(8))
    weights = unique_weights(block)
    path = TARGET.lower(block, weights, tmp_path / "toy").path
    TARGET.check(path, block)
    (result,) = TARGET.engine(path, block.inputs, block.outputs)("base", inputs_of(block)).values()
    assert relative(result, eager(block, weights)) < LIMIT


def test_check_finds_another_storage(cases: Callable[[str, str], Case]) -> None:
    block, path = cases("linear-2d", "int8").block, cases("linear-2d", "int8").path
    for other in (Affine(8, symmetric=False), Affine(8, block=160 // 5), FLOAT32):
        with pytest.raises(LoweringError, match=r"weights\.bin' has \d+ bytes, expected|is not one of the block's, or"):
            TARGET.check(path, quantized(block, other))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    block = made("linear-2d", "int8")
    weights = dict(unique_weights(block))
    weights["leaf.linear.weight"][3, 4] = math.nan
    with pytest.raises(LoweringError, match=r"weight 'leaf\.linear\.weight' has numbers that are NaN or infinite"):
        TARGET.lower(block, weights, tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


# --- the transformer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["int4-block32-asymmetric"])
def test_a_pair_of_the_transformer(cut_small: Any, storage: str, tmp_path: Path) -> None:
    """All matrices at once, in both functions, which read the same file."""
    cut = cut_small(TARGET.forms)
    block = quantized(cut.block("pair_0"), FLOAT32)
    matrices = {
        n for n, w in block.weights.items() if len(w.shape) == 2 and n.endswith("weight") and w.shape[1] % 32 == 0
    }
    kept = {
        n: dataclasses.replace(w, storage=STORAGES[storage]) if n in matrices else w for n, w in block.weights.items()
    }
    block = dataclasses.replace(block, weights=kept)
    weights = cut.weights(block)
    artifact = TARGET.lower(block, weights, tmp_path / "pair_0")
    TARGET.check(artifact.path, block)
    engine = TARGET.engine(artifact.path, block.inputs, block.outputs)
    decoded = dict(Decoded(block.weights, weights))
    for function in ("base", "merged"):
        inputs = cut.inputs("pair_0")
        with torch.no_grad():
            expected = block.module(function, decoded)(*inputs.values())
        for port, want in zip(block.outputs, expected, strict=True):
            assert relative(engine(function, inputs)[port.name], want) < LIMIT
    template = TARGET.bind(artifact, StoredParts(block.weights, weights))
    stamped = TARGET.stamp(template, StoredParts(block.weights, weights), tmp_path / "stamped")
    assert content(stamped.path) == content(TARGET.lower(block, weights, tmp_path / "direct").path)
