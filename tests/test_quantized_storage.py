"""Weights as scaled integers and as palettes: parts, errors, degenerate weights, and what models run on instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Decoded

from toolchain.errors import LoweringError
from toolchain.ir.affine import Affine
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.palette import Palette
from toolchain.ir.storage import FLOAT16, Storage
from toolchain.ir.stored import StoredParts, decoding_reader, part_key
from toolchain.ir.weights import Weight, WeightSource

F16, F32, BF16 = DTYPES["float16"], DTYPES["float32"], DTYPES["bfloat16"]
AFFINE = [
    Affine(8),
    Affine(8, symmetric=False),
    Affine(8, 32),
    Affine(4, 32),
    Affine(4, 16, symmetric=False),
    Affine(4, 32, clip="error"),
    Affine(4, 32, symmetric=False, clip="half-quadratic"),
    Affine(4),
]
PALETTES = [Palette(bits) for bits in (1, 2, 3, 4, 6, 8)] + [Palette(4, 8), Palette(6, 1)]
EVERY = [*AFFINE, *PALETTES]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def degenerate() -> torch.Tensor:
    """A channel of zeros, one of tiny numbers, one with an outlier, two equal ones, one of one sign."""
    weight = random(16, 64)
    weight[0], weight[1], weight[3] = 0.0, 1e-30, weight[4]
    weight[2, 5] = 3e4
    weight[5] = weight[5].abs() + 1
    return weight


def error(storage: Storage, weight: torch.Tensor) -> float:
    return float((storage.decode(storage.encode(weight)) - weight).norm() / weight.norm())


def hold_parts(storage: Storage, weight: torch.Tensor) -> None:
    parts = storage.encode(weight)
    promised = [(p.name, p.shape, p.dtype.torch) for p in storage.parts(weight.shape)]
    assert [(name, tuple(value.shape), value.dtype) for name, value in parts.items()] == promised
    decoded = storage.decode(parts)
    assert decoded.dtype is torch.float32
    assert decoded.shape == weight.shape
    assert bool(torch.isfinite(decoded).all())


# --- parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(16, 64), (32, 32, 3, 3), (8, 32, 3, 3, 3)], ids=str)
def test_what_is_encoded_is_what_was_promised(storage: Storage, shape: tuple[int, ...]) -> None:
    hold_parts(storage, random(*shape))


@pytest.mark.parametrize("storage", EVERY, ids=str)
def test_degenerate_weights(storage: Storage) -> None:
    hold_parts(storage, degenerate())
    zeros = torch.zeros(16, 64)
    assert torch.equal(storage.decode(storage.encode(zeros)), zeros)


def test_bytes() -> None:
    shape = (1152, 4608)
    numbers = math.prod(shape)
    assert Affine(8, scale=F16).bytes(shape) == numbers + 2 * 1152
    assert Affine(8, symmetric=False, scale=F16).bytes(shape) == numbers + 3 * 1152
    assert Affine(4, 32, scale=F16).bytes(shape) == numbers // 2 + 2 * numbers // 32
    assert Affine(4, 32, symmetric=False, scale=F16).bytes(shape) == numbers // 2 + 5 * numbers // 64
    assert Palette(3, number=F16).bytes(shape) == 3 * numbers // 8 + 2 * 8
    assert Palette(4, 16, number=F16).bytes(shape) == numbers // 2 + 72 * 16 * 2


def test_names_tell_storages_apart() -> None:
    every = [dataclasses.replace(s, scale=t) for s in AFFINE for t in (F16, BF16, F32)]
    every += [dataclasses.replace(s, number=t) for s in PALETTES for t in (F16, F32)]  # type: ignore[misc]
    assert len({s.name for s in every}) == len(every)
    assert Affine(4, 32, symmetric=False, clip="error", scale=F16).name == "int4-block32-asymmetric-clip-error-f16"
    assert Palette(6, 16, F16).name == "palette6-group16-f16"


def test_blocks_and_groups_that_do_not_divide() -> None:
    assert Affine(4, 32).refusal((8, 64)) is None
    assert Affine(4, 64).refusal((8, 96)) == "blocks of 64 do not divide its 96 columns; 16, 32 do"
    assert Affine(4, 32).refusal((8, 12)) == (
        "blocks of 32 do not divide its 12 columns; no power of two from 16 on does; use int8"
    )
    assert Palette(4, 16).refusal((24, 8)) == "groups of 16 do not divide its 24 channels; 1, 2, 4, 8 do"
    assert "two dimensions" in str(Affine(8).refusal((8,)))


# --- errors ------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-6, 4),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([None, 16, 32]),
    symmetric=st.booleans(),
    scale=st.sampled_from([F16, BF16, F32]),
)
def test_no_number_is_off_by_more_than_half_a_step(
    seed: int, exponent: int, bits: int, block: int | None, symmetric: bool, scale: object
) -> None:
    storage = Affine(bits, block, symmetric, scale=scale)  # type: ignore[arg-type]
    weight = random(8, 32, seed=seed) * 10.0**exponent
    parts = storage.encode(weight)
    step = parts["scale"].float().expand(8, -1).repeat_interleave(32 // parts["scale"].shape[1], 1)
    # rounding of the scale and of the zero moves what lies at the end of the range by up to one step more
    slack = 0.5 + (1 << bits) * storage.scale.rounding + (0.5 if not symmetric else 0.0)
    assert bool(((storage.decode(parts) - weight).abs() <= slack * step * 1.0001).all())


def test_what_clipping_and_zeros_gain() -> None:
    weight = random(64, 256) + 0.5 * random(64, 1, seed=1)
    plain = error(Affine(4, 32), weight)
    assert error(Affine(4, 32, clip="error"), weight) < 0.95 * plain
    assert error(Affine(4, 32, symmetric=False), weight) < 0.95 * plain
    assert error(Affine(4, 32, clip="half-quadratic"), weight) < plain


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.6028), (2, 0.3428), (3, 0.1858), (4, 0.0975)])
def test_palettes_reach_the_best_tables_for_normal_numbers(bits: int, expected: float) -> None:
    """Max, 1960: the least mean squared errors by 2, 4, 8 and 16 levels are 0.3634, 0.1175, 0.03454, 0.009497."""
    assert error(Palette(bits), random(512, 512)) == pytest.approx(expected, rel=0.01)


def test_a_palette_is_exact_where_there_are_few_numbers() -> None:
    few = torch.tensor([-2.0, 0.25, 0.5, 7.0])[torch.randint(4, (16, 64), generator=torch.Generator().manual_seed(0))]
    assert error(Palette(2), few) < 1e-6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([1, 2, 3, 4, 6, 8]), group=st.sampled_from([None, 1, 4]))
def test_every_number_gets_the_nearest_of_its_table(seed: int, bits: int, group: int | None) -> None:
    storage, weight = Palette(bits, group), random(8, 48, seed=seed)
    parts = storage.encode(weight)
    tables = parts["table"].repeat_interleave(8 // len(parts["table"]), 0)
    nearest = (weight[:, :, None] - tables[:, None, :]).abs().amin(2)
    torch.testing.assert_close((storage.decode(parts) - weight).abs(), nearest, rtol=0, atol=1e-6)
    assert bool((parts["table"][:, 1:] >= parts["table"][:, :-1]).all())


@pytest.mark.parametrize("storage", EVERY, ids=str)
def test_half_precision_is_encoded_as_float32_is(storage: Storage) -> None:
    half = random(16, 64).to(torch.bfloat16)
    narrow, wide = storage.encode(half), storage.encode(half.float())
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


def test_blocks_are_encoded_alike_wherever_they_lie() -> None:
    """Large weights are taken apart into pieces."""
    weight = random(64, 8192)
    whole, part = Affine(4, 32).encode(weight), Affine(4, 32).encode(weight[40:41])
    assert torch.equal(whole["values"][40:41], part["values"])
    assert torch.equal(whole["scale"][40:41], part["scale"])


# --- by name -----------------------------------------------------------------------------------------


def weights() -> dict[str, Weight]:
    sources = {name: WeightSource((name,), shape) for name, shape in (("a", (16, 32)), ("b", (8, 32)), ("c", (5,)))}
    storages: Mapping[str, Storage] = {"a": Affine(8, symmetric=False), "b": Palette(4), "c": FLOAT16}
    return {name: Weight(source, storages[name]) for name, source in sources.items()}


def test_parts_by_name() -> None:
    values = {"a": random(16, 32), "b": random(8, 32), "c": random(5)}
    parts = StoredParts(weights(), values)
    assert list(parts) == ["a:values", "a:scale", "a:zero", "b:indices", "b:table", "c"]
    assert part_key("a", "scale") == "a:scale"
    assert parts["c"] is values["c"]
    assert torch.equal(parts["a:scale"], Affine(8, symmetric=False).encode(values["a"])["scale"])
    decoded = Decoded(weights(), values)
    assert torch.equal(decoded["b"], Palette(4).decode(Palette(4).encode(values["b"])))
    assert decoded["c"] is values["c"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    values = {"a": random(16, 32), "b": random(8, 32), "c": random(5)}
    values["a"][3, 4] = bad
    with pytest.raises(LoweringError, match="weight 'a' has numbers that are NaN or infinite"):
        StoredParts(weights(), values)["a:scale"]


# --- the checkpoint, as if it held what is stored ----------------------------------------------------


def test_a_checkpoint_as_it_is_stored() -> None:
    """Parts of a tensor that are quantized by themselves, and one that two tensors are fused to."""
    tensors = {"conv": random(8, 32, 3, 3, 3), "q": random(16, 32), "k": random(24, 32, seed=1), "bias": random(8)}
    int8 = Affine(8)
    taps = {
        f"tap{i}": Weight(WeightSource(("conv",), (8, 32, 3, 3), select=((2, i),)), int8) for i in range(2)
    }  # the third is left as it is
    fused = {
        "qk": Weight(WeightSource(("q", "k"), (40, 32)), Affine(4, 32)),
        "bias": Weight(WeightSource(("bias",), (8,))),
    }
    read = decoding_reader(taps | fused, tensors.__getitem__)
    stored = read("conv")
    for i in range(2):
        tap = tensors["conv"][:, :, i]
        assert torch.equal(stored[:, :, i], int8.decode(int8.encode(tap)))
    assert torch.equal(stored[:, :, 2], tensors["conv"][:, :, 2])
    both = Affine(4, 32).decode(Affine(4, 32).encode(torch.cat([tensors["q"], tensors["k"]])))
    assert torch.equal(read("q"), both[:16])
    assert torch.equal(read("k"), both[16:])
    assert read("bias") is tensors["bias"]
    assert not torch.equal(tensors["q"], both[:16])  # the checkpoint itself stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_put_undoes_value(dtype: torch.dtype) -> None:
    tensors = {"q": random(16, 32).to(dtype), "k": random(24, 32).to(dtype)}
    source = WeightSource(("q", "k"), (20, 8), narrow=((0, 4, 20), (1, 8, 8)))
    value = random(20, 8, seed=5).to(dtype)
    changed = dict(zip(("q", "k"), source.put(list(tensors.values()), value), strict=True))
    assert torch.equal(source.value(changed.__getitem__), value)
    kept = torch.cat(list(tensors.values())) == torch.cat(list(changed.values()))
    assert int((~kept).sum()) <= value.numel()
