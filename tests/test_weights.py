"""Where a parameter's numbers come from: n tensors, cut and put together, and the digest that decides a stamp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from passes.partition import Partition
from toolchain.ir.blocks import Block, extract_blocks
from toolchain.ir.feeds import Given, Latents
from toolchain.ir.graph import Input, LoweredForm, capture, wire
from toolchain.ir.storage import FLOAT16, FLOAT32
from toolchain.ir.weights import Weight, WeightSource
from toolchain.weights.block_digests import block_digest, source_digest
from toolchain.weights.block_weights import BlockWeights
from toolchain.weights.checkpoint import open_checkpoint
from toolchain.weights.digests import tensor_digests

A, B, C = (torch.arange(12.0).reshape(3, 4) + 100 * i for i in range(3))
TENSORS = {"a": A, "b": B, "c": C}


def value(*tensors: str, shape: tuple[int, ...], **parts: Any) -> torch.Tensor:
    return WeightSource(tensors, shape, **parts).value(TENSORS.__getitem__)


# --- the numbers -------------------------------------------------------------------------------------


def test_one_tensor_as_it_is() -> None:
    assert torch.equal(value("a", shape=(3, 4)), A)
    assert not WeightSource(("a",), (3, 4)).is_part


def test_a_reshaped_tensor() -> None:
    assert torch.equal(value("a", shape=(12,)), torch.arange(12.0))
    assert not WeightSource(("a",), (12,)).is_part


def test_tensors_in_a_row() -> None:
    assert torch.equal(value("a", "b", "c", shape=(9, 4)), torch.vstack((A, B, C)))
    assert torch.equal(value("c", "a", shape=(6, 4)), torch.vstack((C, A)))
    assert torch.equal(value("a", "b", shape=(3, 8), concat=1), torch.hstack((A, B)))
    assert torch.equal(value("a", "a", shape=(6, 4)), torch.vstack((A, A)))


def test_a_range_of_a_tensor() -> None:
    assert torch.equal(value("a", shape=(2, 4), narrow=((0, 1, 2),)), A[1:])
    assert torch.equal(value("a", shape=(2, 2), narrow=((1, 1, 2), (0, 0, 2))), A[:2, 1:3])
    assert torch.equal(value("a", "b", shape=(2, 4), narrow=((0, 2, 2),)), torch.stack((A[2], B[0])))


def test_one_of_a_dimension() -> None:
    assert torch.equal(value("a", shape=(4,), select=((0, 2),)), A[2])
    assert torch.equal(value("a", shape=(1, 1), select=((1, 3), (0, 1))), A[1:2, 3:])
    assert torch.equal(value("b", shape=(1, 2), narrow=((1, 1, 2),), select=((0, -1),)), B[2:, 1:3])


def test_what_is_left_out_makes_a_part() -> None:
    assert WeightSource(("a",), (1, 4), narrow=((0, 0, 1),)).is_part
    assert WeightSource(("a",), (4,), select=((0, 0),)).is_part
    assert not WeightSource(("a", "b"), (6, 4)).is_part


def test_a_shape_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size 12"):
        value("a", shape=(5, 5))


def test_tensors_are_asked_for_by_name_in_order() -> None:
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    WeightSource(("b", "a", "b"), (9, 4)).value(read)
    assert asked == ["b", "a", "b"]


def test_the_checkpoints_type_stays() -> None:
    halves = {k: v.half() for k, v in TENSORS.items()}
    assert WeightSource(("a", "b"), (6, 4)).value(halves.__getitem__).dtype is torch.float16


@st.composite
def sources(draw: st.DrawFn) -> tuple[WeightSource, dict[str, torch.Tensor], torch.Tensor]:
    """A source, tensors for it, and the value by torch's own indexing."""
    rank = draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    concat = draw(st.integers(0, rank - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensors = {}
    for i in range(draw(st.integers(1, 3))):
        own = [draw(st.integers(1, 4)) if d == concat else n for d, n in enumerate(shape)]
        tensors[f"t{i}"] = torch.randn(own, generator=generator)
    expected = torch.cat(list(tensors.values()), concat)
    narrow = []
    for _ in range(draw(st.integers(0, 2))):
        dim = draw(st.integers(0, rank - 1))
        start = draw(st.integers(0, expected.shape[dim] - 1))
        length = draw(st.integers(1, expected.shape[dim] - start))
        narrow.append((dim, start, length))
        expected = expected[(slice(None),) * dim + (slice(start, start + length),)]
    select = []
    for _ in range(draw(st.integers(0, expected.dim() - 1))):
        dim = draw(st.integers(0, expected.dim() - 1))
        index = draw(st.integers(0, expected.shape[dim] - 1))
        select.append((dim, index))
        expected = expected[(slice(None),) * dim + (index,)]
    wanted = draw(st.sampled_from([tuple(expected.shape), (expected.numel(),), (1, expected.numel(), 1)]))
    source = WeightSource(tuple(tensors), wanted, tuple(select), tuple(narrow), concat)
    return source, tensors, expected.reshape(wanted)


@settings(max_examples=200, deadline=None)
@given(case=sources())
def test_a_source_is_what_torch_makes_of_it(
    case: tuple[WeightSource, dict[str, torch.Tensor], torch.Tensor],
) -> None:
    source, tensors, expected = case
    found = source.value(tensors.__getitem__)
    assert found.shape == source.shape == expected.shape
    assert torch.equal(found, expected)
    weight = Weight(source)
    assert (weight.shape, weight.parameters, weight.bytes) == (source.shape, found.numel(), 4 * found.numel())
    assert Weight(source, FLOAT16).bytes == 2 * found.numel()
    whole = sum(t.numel() for t in tensors.values())
    assert source.is_part or found.numel() == whole


# --- the digest --------------------------------------------------------------------------------------

SOURCE = WeightSource(("a", "b"), (4,), select=((0, 1),), narrow=((0, 1, 4),), concat=0)
DIGESTS = {"a": "1" * 64, "b": "2" * 64, "c": "3" * 64}


def block_of(weights: Mapping[str, Weight]) -> Block:
    return Block("toy", "block", "step", {}, {}, {}, weights)


def digest(source: WeightSource, digests: Mapping[str, str] = DIGESTS, **more: Weight) -> str:
    return block_digest(block_of({"weight": Weight(source)} | more), digests, {})


CHANGES: dict[str, Callable[[], str]] = {
    "a tensor's numbers": lambda: digest(SOURCE, DIGESTS | {"b": "4" * 64}),
    "another tensor": lambda: digest(dataclasses.replace(SOURCE, tensors=("a", "c"))),
    "a tensor more": lambda: digest(dataclasses.replace(SOURCE, tensors=("a", "b", "c"))),
    "a tensor less": lambda: digest(dataclasses.replace(SOURCE, tensors=("a",))),
    "the order of the tensors": lambda: digest(dataclasses.replace(SOURCE, tensors=("b", "a"))),
    "the dimension they are put together along": lambda: digest(dataclasses.replace(SOURCE, concat=1)),
    "the range": lambda: digest(dataclasses.replace(SOURCE, narrow=((0, 0, 4),))),
    "the range's length": lambda: digest(dataclasses.replace(SOURCE, narrow=((0, 1, 3),))),
    "the range's dimension": lambda: digest(dataclasses.replace(SOURCE, narrow=((1, 1, 4),))),
    "no range": lambda: digest(dataclasses.replace(SOURCE, narrow=())),
    "the place in a dimension": lambda: digest(dataclasses.replace(SOURCE, select=((0, 2),))),
    "the dimension of the place": lambda: digest(dataclasses.replace(SOURCE, select=((1, 1),))),
    "no place": lambda: digest(dataclasses.replace(SOURCE, select=())),
    "a place for a range": lambda: digest(dataclasses.replace(SOURCE, narrow=(), select=((0, 1), (0, 1)))),
    "the shape": lambda: digest(dataclasses.replace(SOURCE, shape=(2, 2))),
    "a weight more": lambda: digest(SOURCE, more=Weight(SOURCE)),
}


def test_every_change_is_another_digest() -> None:
    found = {name: change() for name, change in CHANGES.items()} | {"none": digest(SOURCE)}
    by_digest: dict[str, list[str]] = {}
    for name, key in found.items():
        by_digest.setdefault(key, []).append(name)
    assert [names for names in by_digest.values() if len(names) > 1] == []


def test_the_weights_own_name_decides() -> None:
    own, other = (block_digest(block_of({name: Weight(SOURCE)}), DIGESTS, {}) for name in ("weight", "bias"))
    assert own != other


def test_what_does_not_decide() -> None:
    """Tensors that are not used, what they are called, and the dimension along which one is put together."""
    assert digest(SOURCE, DIGESTS | {"c": "9" * 64}) == digest(SOURCE)
    renamed = dataclasses.replace(SOURCE, tensors=("x", "y"))
    assert digest(renamed, {"x": DIGESTS["a"], "y": DIGESTS["b"]}) == digest(SOURCE)
    alone = dataclasses.replace(SOURCE, tensors=("a",))
    assert digest(dataclasses.replace(alone, concat=1)) == digest(alone)


def test_an_alias_is_the_tensor_that_is_held() -> None:
    source = WeightSource(("official", "b"), (6, 4))
    held = {"other name": DIGESTS["a"], "b": DIGESTS["b"]}
    assert source_digest(source, held, {"official": "other name"}) == source_digest(
        WeightSource(("a", "b"), (6, 4)), DIGESTS, {}
    )


# --- a model that fuses what its checkpoint keeps apart, and the other way --------------------------


class Fused(LoweredForm):
    """A linear layer of the checkpoint's q, k and v, then one of a part of a tensor and of a tap."""

    component = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6, device="meta")
        self.out = nn.Linear(6, 3, device="meta")

    def inputs(self) -> tuple[Input, ...]:
        return (Input("x", (2, 4), Latents()),)

    def gives(self) -> dict[str, Given]:
        return {"y": "prediction"}

    def dims(self) -> dict[str, int]:
        return {}

    def unit(self, path: str) -> tuple[str, ...]:
        return ("layer",)

    def source(self, parameter: str, shape: tuple[int, ...]) -> WeightSource:
        if parameter.startswith("qkv."):
            kind = parameter.removeprefix("qkv.")
            return WeightSource(tuple(f"{n}.{kind}" for n in "qkv"), shape)
        if parameter == "out.weight":
            return WeightSource(("both.weight",), shape, select=((2, 1),), narrow=((0, 2, 3),))
        return super().source(parameter, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wire(self.out(self.qkv(x)), "y")


HELD = {f"{n}.weight": (2, 4) for n in "qkv"} | {f"{n}.bias": (2,) for n in "qkv"}
HELD |= {"both.weight": (6, 6, 2), "out.bias": (3,), "unused": (5,)}


@pytest.fixture
def held() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in HELD.items()}


def fused() -> Block:
    (block,) = extract_blocks(Partition()(capture(Fused())))
    return block


def saved(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Any:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(str(folder), folder)


def test_a_fused_block_computes_what_its_tensors_say(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    block = fused()
    weights = dict(BlockWeights(block, saved(tmp_path / "held", held), {}))
    assert all(w.is_contiguous() for w in weights.values())
    x = torch.randn(2, 4)
    (found,) = block.module("base", weights)(x)
    between = torch.cat([x @ held[f"{n}.weight"].T + held[f"{n}.bias"] for n in "qkv"], dim=1)
    torch.testing.assert_close(found, between @ held["both.weight"][2:5, :, 1].T + held["out.bias"])
    assert {w.storage for w in block.weights.values()} == {FLOAT32}


def test_a_fused_block_is_stamped_anew_for_each_of_its_tensors(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    block = fused()

    def of(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
        return block_digest(block, tensor_digests(saved(tmp_path / name, tensors)), {})

    first = of("first", held)
    changed = {name: of(name, held | {name: held[name] + 1}) for name in held}
    assert [name for name, found in changed.items() if found == first] == ["unused"]
    assert len(set(changed.values())) == len(held)
    swapped = held | {"q.weight": held["k.weight"], "k.weight": held["q.weight"]}
    assert of("swapped", swapped) not in (first, *changed.values())
