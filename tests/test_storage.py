"""How weights are kept: plainly, or in parts that a pass asks for and a target must be able to express."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from targets.executorch import ExecuTorchConfig, ExecuTorchTarget
from toolchain.build import entries
from toolchain.errors import LoweringError, RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.graph import Graph
from toolchain.ir.passes import Pass, Pipeline
from toolchain.ir.storage import BFLOAT16, FLOAT16, FLOAT32, PLAIN, Narrow, Part, Plain, Storage
from toolchain.ir.target import Target, TargetConfig
from toolchain.ir.uses import Use
from toolchain.planning.plan import Plan, plan_resolved
from toolchain.planning.resolve import resolve

TINY = {"hidden_size": 8, "num_heads": 2, "depth": 2, "caption_channels": 4, "model_max_length": 3}

# --- plain -------------------------------------------------------------------------------------------


def test_plain_storages_by_name() -> None:
    assert PLAIN == {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
    assert all(storage.name == str(storage) == name for name, storage in PLAIN.items())
    assert Plain(DTYPES["float16"]) == FLOAT16 != FLOAT32
    assert len({FLOAT16, Plain(DTYPES["float16"]), FLOAT32}) == 2


def test_narrow_numbers_are_rounded_and_widened_again() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    narrow = Narrow(DTYPES["float16"])
    parts = narrow.encode(weight)
    assert [(p.name, p.shape, p.dtype.name) for p in narrow.parts(weight.shape)] == [("values", (8, 16), "float16")]
    assert torch.equal(parts["values"], weight.half())
    assert torch.equal(narrow.decode(parts), weight.half().float())
    assert narrow.bytes(weight.shape) == 2 * weight.numel()
    assert narrow.name not in PLAIN


@pytest.mark.parametrize(("name", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
@pytest.mark.parametrize("shape", [(), (5,), (3, 1, 4), (0, 7)], ids=str)
def test_plain_parts_and_bytes(name: str, size: int, shape: tuple[int, ...]) -> None:
    (part,) = PLAIN[name].parts(shape)
    assert (part.name, part.shape, part.dtype) == ("", shape, DTYPES[name])
    assert part.bytes == PLAIN[name].bytes(list(shape)) == size * torch.Size(shape).numel()


@pytest.mark.parametrize("storage", PLAIN.values(), ids=str)
@pytest.mark.parametrize("given_as", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_plain_is_encoded_as_torch_rounds(storage: Plain, given_as: torch.dtype) -> None:
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(given_as)
    parts = storage.encode(weight)
    hold_parts(storage, weight.shape, parts)
    assert torch.equal(parts[""], weight.to(storage.dtype.torch))
    decoded = storage.decode(parts)
    assert decoded.dtype is torch.float32
    assert torch.equal(decoded, weight.to(storage.dtype.torch).float())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-3, 4), storage=st.sampled_from(list(PLAIN.values())))
def test_the_error_is_what_the_format_says(seed: int, exponent: int, storage: Plain) -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    weight = weight[weight.abs() > 2.0**-14]  # float16's normal numbers
    error = (storage.decode(storage.encode(weight)) - weight).abs() / weight.abs()
    assert bool((error <= storage.dtype.rounding).all())


def hold_parts(storage: Storage, shape: Sequence[int], parts: Mapping[str, torch.Tensor]) -> None:
    """What is encoded is of the names, shapes and types that the storage promises, in order."""
    promised = [(p.name, p.shape, p.dtype.torch) for p in storage.parts(shape)]
    assert [(name, tuple(value.shape), value.dtype) for name, value in parts.items()] == promised
    assert sum(value.numel() * value.element_size() for value in parts.values()) == storage.bytes(shape)


# --- one of the tests' own ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Int8Rows(Storage):
    """A whole number for each weight, and a scale for each row."""

    @property
    def name(self) -> str:
        return "int8-rows"

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        return Part("values", tuple(shape), DTYPES["int8"]), Part("scales", (shape[0],), DTYPES["float32"])

    def encode(self, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        rows = weight.float().flatten(1)
        scales = rows.abs().amax(dim=1).clamp(min=1e-12) / 127
        return {"values": (rows / scales[:, None]).round().to(torch.int8).reshape(weight.shape), "scales": scales}

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = parts["values"].float()
        return values * parts["scales"].reshape(-1, *[1] * (values.dim() - 1))


class Compress(Pass):
    """Keep the matrices of every MLP in rows of int8."""

    name = "compress"

    def call(self, graph: Graph) -> Graph:
        weights = {
            name: dataclasses.replace(w, storage=Int8Rows()) if ".mlp.fc" in name and len(w.shape) == 2 else w
            for name, w in graph.weights.items()
        }
        return dataclasses.replace(graph, weights=weights)


class Open(ExecuTorchTarget):
    """A target that takes it."""

    def keep(self, asked: Storage, use: Use) -> Storage:
        return asked if isinstance(asked, Int8Rows) else super().keep(asked, use)


def recipe(target: Any, *passes: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "model": "open-sora-v1.2",
            "video": {"frames": 17, "height": 32, "width": 48},
            "transformer": {"checkpoint": "none", "config": TINY, "passes": list(passes)},
            "target": target,
        }
    )


def planned(target: Any, *passes: Any, instead: Target | None = None, compress: bool = True) -> Plan:
    """The plan with the tests' pass before the recipe's partition, and with another target if there is one."""
    build = resolve(recipe(target, *passes), Path(), checkpoints=False)
    part = build.components["transformer"]
    rewrites = (*part.passes.rewrites, *([Compress()] if compress else []))
    part = dataclasses.replace(
        part, pipeline=Pipeline(rewrites, part.passes.partition), target=instead if instead is not None else part.target
    )
    return plan_resolved(dataclasses.replace(build, components={"transformer": part}))


def test_a_storage_of_several_parts() -> None:
    weight = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    storage = Int8Rows()
    hold_parts(storage, weight.shape, storage.encode(weight))
    assert storage.bytes(weight.shape) == 30 + 4 * 5
    assert float((storage.decode(storage.encode(weight)) - weight).norm() / weight.norm()) < 1e-2


@pytest.mark.parametrize(
    "target",
    ["executorch", "onnx", {"name": "coreml", "precision": "float16"}, {"name": "coreml", "precision": "float32"}],
    ids=str,
)
def test_a_storage_that_the_target_cannot_express(target: Any) -> None:
    own = planned(target, compress=False).target
    assert own.keep(own.storage, "linear") == own.storage
    with pytest.raises(RecipeError) as error:
        planned(target)
    weight = "spatial_blocks.0.mlp.fc1.weight"
    said = str(error.value)
    assert said.startswith(
        f"transformer: weight '{weight}' is to be kept as int8-rows, which target '{own.name}' with precision "
        f"{own.precision} cannot; for the matrix of a linear layer, it takes {own.precision}"
    )
    assert error.value.exit_code == 2


def test_a_target_that_can_express_it_plans_by_its_bytes() -> None:
    part = planned("executorch", instead=Open()).components["transformer"]
    without = planned("executorch", compress=False).components["transformer"]
    block, plain = (next(b for b in p.blocks if b.name == "pair_0") for p in (part, without))
    kept = {n: w for n, w in block.weights.items() if w.storage == Int8Rows()}
    assert sorted({n.split(".")[-2] for n in kept}) == ["fc1", "fc2"]
    rows = sum(w.shape[0] for w in kept.values())
    numbers = sum(w.parameters for w in kept.values())
    assert plain.weight_bytes - block.weight_bytes == 3 * numbers - 4 * rows
    assert part.weight_bytes == sum(b.weight_bytes for b in part.blocks) < without.weight_bytes
    assert block.parameters == plain.parameters
    assert block.structure() != plain.structure()
    entry = entries.block(block, [], ("base",), None, None, part.target, "transformer", part.memory["pair_0"])
    assert entry.weight_bytes == {"float32": block.weight_bytes - numbers - 4 * rows, "int8-rows": numbers + 4 * rows}


def test_blocks_are_packed_by_the_bytes_that_are_kept() -> None:
    """Two pairs fit a block of this size as they are kept, and only one as plain numbers."""
    sizes = {}
    for name, compress in (("kept", True), ("plain", False)):
        part = planned("executorch", instead=Open(), compress=compress).components["transformer"]
        sizes[name] = sum(b.weight_bytes for b in part.blocks if b.name.startswith("pair"))
    assert sizes["kept"] < sizes["plain"]
    limit = {"partition": {"max_bytes": (sizes["kept"] + sizes["plain"]) // 2}}
    names = {
        compress: [
            b.name
            for b in planned("executorch", limit, instead=Open(), compress=compress).components["transformer"].blocks
            if b.name.startswith("pair")
        ]
        for compress in (True, False)
    }
    assert names == {True: ["pair_0_1"], False: ["pair_0", "pair_1"]}


def test_legal_forms_keep_their_storage() -> None:
    part = planned("executorch", instead=Open()).components["transformer"]
    for pair in part.pairs:
        lowered, plain = ({w.storage for w in b.weights.values()} for b in (pair.lowered, pair.plain))
        assert lowered == plain


def test_a_precision_that_no_plain_storage_has() -> None:
    class Loose(TargetConfig):
        precision: str = "int4"

    class Odd(ExecuTorchTarget):
        Config = Loose  # type: ignore[assignment]

    with pytest.raises(LoweringError) as error:
        planned("executorch", instead=Odd(Loose()))  # type: ignore[arg-type]
    assert str(error.value) == "target 'executorch': precision 'int4' is none of float32, float16, bfloat16"
    assert ExecuTorchTarget(ExecuTorchConfig()).storage == FLOAT32
