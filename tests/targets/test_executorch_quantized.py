"""ExecuTorch programs with quantized linear layers: what is stored, what is computed with it, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Decoded, degenerate, relative
from test_executorch import toy_block
from torch import nn

from targets.executorch import ExecuTorchTarget
from targets.executorch.quantized import Unset, with_quantized
from targets.exporting import export
from toolchain.errors import LoweringError
from toolchain.ir.affine import Affine
from toolchain.ir.blocks import Block
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.leaves import Leaf
from toolchain.ir.palette import Palette
from toolchain.ir.storage import BFLOAT16, FLOAT16, FLOAT32, Storage
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Artifact, Template, UnsupportedStorageError, unique_weights
from toolchain.ir.uses import Use
from toolchain.ir.weights import quantized as quantized_of

pytestmark = pytest.mark.slow

TARGET = ExecuTorchTarget()
LIMIT = 1e-5
"""Between a program and the same arithmetic in eager mode, activations rounded alike."""
ROUNDING = 2e-2
"""Between a program and eager float32 on the weights that it stores, which does not round activations."""
BF16 = DTYPES["bfloat16"]
HALF = "pair_0_temporal"
STORAGES = {
    "int8": Affine(8),
    "int4": Affine(4, 32),
    "int8-clip": Affine(8, clip="half-quadratic"),
    "int4-clip": Affine(4, 32, clip="half-quadratic"),
    "int4-block160": Affine(4, 160),
}


class Linear(Leaf):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(160, 24, bias=bias, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


class Chain(Leaf):
    """A layer that is used twice, activations that XNNPACK fuses, one it has no kernel for, and a layer in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Linear(160, 160, device="meta"), nn.Linear(160, 24, bias=False, device="meta")
        self.plain = nn.Linear(160, 24, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # no row of zeros: int4 gives nearly zeros for one, of which the norm makes large numbers
        x = torch.relu(self.wide(torch.erf(x) + 1))
        x = F.layer_norm(self.wide(x), (160,))
        return torch.cat([self.last(x), self.plain(x)], -1)


class Two(Leaf):
    """Two layers that differ in nothing but their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(160, 24, bias=False, device="meta") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


class Turned(Leaf):
    """A matrix that is used as no linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(160, 64, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


LEAVES: dict[str, tuple[Callable[[], Leaf], tuple[int, ...]]] = {
    "3d": (lambda: Linear(True), (2, 3, 160)),
    "plain-2d": (lambda: Linear(False), (6, 160)),
    "4d": (lambda: Linear(True), (1, 2, 3, 160)),
    "chain": (Chain, (2, 3, 160)),
    "two": (Two, (4, 160)),
}
CASES = [("3d", "int8"), ("3d", "int4"), ("plain-2d", "int4-clip"), ("4d", "int8-clip"), ("4d", "int4-block160")]
CASES += [("chain", "int8"), ("chain", "int4")]


def kept(block: Block, storage: Storage, but: str = "plain") -> Block:
    """The block with its matrices kept as ``storage``, where their names have no ``but``."""
    own = TARGET.keep(storage, "linear")
    weights = {
        n: dataclasses.replace(w, storage=own) if len(w.shape) > 1 and but not in n else w
        for n, w in block.weights.items()
    }
    return dataclasses.replace(block, weights=weights)


def made(leaf: str, storage: str) -> Block:
    make, shape = LEAVES[leaf]
    return kept(toy_block(make(), *shape), STORAGES[storage])


def inputs_of(block: Block) -> dict[str, torch.Tensor]:
    """Rows of random numbers, one of zeros, one that is tiny, and one with an outlier."""
    x = torch.randn(block.inputs[0].shape, generator=torch.Generator().manual_seed(1))
    rows = x.view(-1, x.shape[-1])
    rows[0] = 0.0
    rows[1] *= 1e-4
    rows[2, 5] = 300.0
    return {"x": x}


def rounded(
    block: Block, weights: Mapping[str, torch.Tensor], function: str, inputs: Mapping[str, Any]
) -> list[torch.Tensor]:
    """What the block computes with the parts of its weights when activations are rounded as XNNPACK rounds them."""
    own = quantized_of(block.weights)
    module = with_quantized(export(block, function, Unset(own, weights)), own, dict(StoredParts(own, weights)), "")
    with torch.no_grad():
        return list(module(*inputs.values()))


def decoded(
    block: Block, weights: Mapping[str, torch.Tensor], function: str, inputs: Mapping[str, Any]
) -> list[torch.Tensor]:
    """What it computes on the numbers that its artifact stands for, as the gate does."""
    with torch.no_grad():
        return list(block.module(function, dict(Decoded(block.weights, weights)))(*inputs.values()))


@dataclass(frozen=True)
class Case:
    """A block with quantized weights, lowered with random ones, and the template of that."""

    block: Block
    unique: Mapping[str, torch.Tensor]
    path: Path
    template: Template
    folder: Path

    def run(self, path: Path) -> torch.Tensor:
        engine = TARGET.engine(path, self.block.inputs, self.block.outputs)
        return engine("base", inputs_of(self.block))["y"]

    def hold(self, path: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """The engine computes with our integers and scales, and with activations in int8."""
        found, (same,) = self.run(path), rounded(self.block, weights, "base", inputs_of(self.block))
        assert bool(found.isfinite().all())
        assert relative(found, same) < LIMIT

    def stamp(self, weights: Mapping[str, torch.Tensor]) -> Path:
        parts = StoredParts(self.block.weights, weights)
        return TARGET.stamp(self.template, parts, self.folder / "stamped.pte").path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    @functools.cache
    def make(leaf: str, storage: str) -> Case:
        block, folder = made(leaf, storage), tmp_path_factory.mktemp("case")
        unique = unique_weights(block)
        artifact = TARGET.lower(block, unique, folder / "template.pte")
        path = folder / "lowered.pte"
        path.write_bytes(artifact.path.read_bytes())
        return Case(block, unique, path, TARGET.bind(artifact, StoredParts(block.weights, unique)), folder)

    return make


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, cases: Callable[[str, str], Case]) -> Case:
    return cases(*request.param)


# --- what is computed and stored ---------------------------------------------------------------------


def test_the_engine_computes_with_the_parts(case: Case) -> None:
    TARGET.check(case.path, case.block)
    case.hold(case.path, case.unique)
    (exact,) = decoded(case.block, case.unique, "base", inputs_of(case.block))
    assert 1e-4 < relative(case.run(case.path), exact) < ROUNDING


def test_stamped_is_direct_byte_for_byte(case: Case) -> None:
    assert case.stamp(case.unique).read_bytes() == case.path.read_bytes()
    halves = {n: w.half() for n, w in degenerate(unique_weights(case.block, seed=5)).items()}
    stamped, weights = case.stamp(halves), {n: w.float() for n, w in halves.items()}
    direct = TARGET.lower(case.block, weights, case.folder / "direct.pte").path
    # lowering stores equal biases once
    assert stamped.read_bytes() == direct.read_bytes() or sum(w.dim() == 1 for w in weights.values()) > 1
    case.hold(stamped, weights)


def test_the_program_has_the_packed_parts_and_no_more(case: Case) -> None:
    program, bytes_ = case.path.read_bytes(), 0
    for key, part in StoredParts(case.block.weights, case.unique).items():
        if key.endswith(":values") and "int4" in case.block.weights[key.removesuffix(":values")].storage.name:
            part = ((part[:, ::2] + 8) | ((part[:, 1::2] + 8) << 4)).to(torch.uint8)
        stored = part.contiguous().view(torch.uint8).numpy().tobytes()
        assert program.count(stored) == 1, key
        bytes_ += len(stored)
    assert bytes_ == case.block.weight_bytes
    assert len(program) < bytes_ + (4096 if "chain" not in case.block.weights else 16384) * len(case.block.weights)


def test_equal_values_with_other_scales_are_told_apart(cases: Callable[[str, str], Case]) -> None:
    """Runtimes keep what they have packed of a layer by the key of its values, whatever its scales."""
    case = cases("two", "int8")
    a, b = case.unique
    first = case.unique[a]
    for factor in (4.0, 1.0):
        weights = {a: first, b: factor * first}
        (same,) = rounded(case.block, weights, "base", inputs_of(case.block))
        assert relative(case.run(case.stamp(weights)), same) < LIMIT
    assert hashlib.sha256(
        StoredParts(case.block.weights, weights)[f"{a}:values"].numpy().tobytes()
    ).hexdigest() not in (case.stamp(weights).read_bytes().decode(errors="replace"))


# --- what is taken and refused -----------------------------------------------------------------------

TAKES = "it takes float32, symmetric int8 a channel, and symmetric int4 in blocks of a multiple of 32"
REFUSED: list[tuple[Storage, Use, str]] = [
    (Affine(8, 32), "linear", TAKES),
    (Affine(8, symmetric=False), "linear", TAKES),
    (Affine(4), "linear", TAKES),
    (Affine(4, 16), "linear", TAKES),
    (Affine(4, 32, symmetric=False), "linear", TAKES),
    (Palette(4), "linear", TAKES),
    (FLOAT16, "linear", TAKES),
    (BFLOAT16, "other", "it takes float32"),
    (Affine(8), "convolution", "it takes float32"),
    (Affine(4, 32), "embedding", "it takes float32"),
    (Affine(8), "other", "it takes float32"),
]


@pytest.mark.parametrize(("storage", "use", "says"), REFUSED, ids=str)
def test_what_cannot_be_expressed_is_refused(storage: Storage, use: Use, says: str) -> None:
    with pytest.raises(UnsupportedStorageError) as error:
        TARGET.keep(storage, use)
    assert str(error.value) == says


def test_scales_are_those_that_xnnpack_reads() -> None:
    half = DTYPES["float16"]
    assert TARGET.keep(Affine(8, clip="error", scale=half), "linear") == Affine(8, clip="error")
    assert TARGET.keep(Affine(4, 64, scale=half), "linear") == Affine(4, 64, scale=BF16)
    assert TARGET.keep(Affine(4, 96), "linear").name == "int4-block96-bf16"
    assert TARGET.keep(FLOAT32, "other") == FLOAT32


def test_the_gate_is_told_that_activations_are_rounded() -> None:
    block = toy_block(Linear(True), 2, 160)
    assert TARGET.arithmetic(block) == "float32"
    assert TARGET.arithmetic(kept(block, Affine(8))) == "int8"


def test_a_use_that_cannot_be_rewritten_is_named(tmp_path: Path) -> None:
    block = kept(toy_block(Turned(), 3, 160), Affine(8))
    with pytest.raises(LoweringError) as error:
        TARGET.lower(block, unique_weights(block), tmp_path / "toy.pte")
    assert str(error.value) == (
        "block 'toy', function 'base': weight 'leaf.weight' is kept as int8-f32, which operator 'leaf__matmul' cannot "
        "read; keep it as float32"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_xnnpack_leaves_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.backends.xnnpack.partition.config.generic_node_configs import AddConfig

    from targets.executorch import lower

    sums_alone = functools.partial(vars(lower)["XnnpackPartitioner"], configs=[AddConfig])
    monkeypatch.setattr(lower, "XnnpackPartitioner", sums_alone)
    block = made("plain-2d", "int8")
    with pytest.raises(
        LoweringError, match=r"function 'base': XNNPACK does not take the quantized layer of '\w+'; keep"
    ):
        TARGET.lower(block, unique_weights(block), tmp_path / "toy.pte")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    block = made("plain-2d", "int8")
    weights = dict(unique_weights(block))
    weights["leaf.linear.weight"][3, 4] = math.nan
    with pytest.raises(LoweringError, match=r"weight 'leaf\.linear\.weight' has numbers that are NaN or infinite"):
        TARGET.lower(block, weights, tmp_path / "toy.pte")
    assert list(tmp_path.iterdir()) == []


# --- the transformer ---------------------------------------------------------------------------------


def test_a_pair_of_the_transformer(cut_small: Any, tmp_path: Path) -> None:
    """Matrices in int8 and int4, in both functions, which read the same parts; half a pair has each kind of them."""
    cut = cut_small(TARGET.forms, max_bytes="300kB")
    block = cut.block(HALF)
    weights = {
        n: dataclasses.replace(w, storage=TARGET.keep(STORAGES["int4" if "mlp" in n else "int8"], "linear"))
        if len(w.shape) == 2 and n.endswith("weight")
        else w
        for n, w in block.weights.items()
    }
    block = dataclasses.replace(block, weights=weights)
    values, unique = cut.weights(block), unique_weights(block)
    lowered = TARGET.lower(block, unique, tmp_path / "unique.pte")
    template = TARGET.bind(lowered, StoredParts(block.weights, unique))
    artifact = TARGET.stamp(template, StoredParts(block.weights, values), tmp_path / "half.pte")
    assert artifact == Artifact(tmp_path / "half.pte", ("base", "merged"))
    TARGET.check(artifact.path, block)
    engine = TARGET.engine(artifact.path, block.inputs, block.outputs)
    inputs = cut.inputs(HALF)
    for function in artifact.functions:
        (same,), (exact,) = (f(block, values, function, inputs) for f in (rounded, decoded))
        (found,) = engine(function, inputs).values()
        assert relative(found, same) < 2e-3  # a number on the edge of two integers may fall to either side
        assert relative(found, exact) < ROUNDING
