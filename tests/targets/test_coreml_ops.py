"""Operators of the Core ML engine against coremltools' own definition of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from coremltools.optimize import _utils as packing
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import bools, floats, halves, hold, ints, results

from targets.coreml.dtypes import DTYPES
from targets.coreml.ops import OPERATORS
from targets.coreml.values import unpack

Case = tuple[str, Mapping[str, Any]]

PAIRS = [(floats(2, 3), floats(2, 3, seed=1)), (floats(2, 1, 4), floats(3, 1, seed=1)), (floats(3), np.float32(2.5))]
BINARY = ("add", "sub", "mul", "real_div", "floor_div", "mod", "maximum", "minimum")
COMPARE = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
LOGIC = ("logical_and", "logical_or", "logical_xor")
UNARY = (
    *("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "identity", "round", "sign", "sin"),
    *("sinh", "square", "tan", "tanh", "relu", "relu6", "sigmoid", "softplus", "softsign"),
)
REDUCTIONS = (
    *("reduce_sum", "reduce_mean", "reduce_prod", "reduce_max", "reduce_min", "reduce_l1_norm", "reduce_l2_norm"),
    *("reduce_sum_square", "reduce_log_sum", "reduce_log_sum_exp"),
)
X = floats(2, 3, 4)
POSITIVE = floats(2, 3, 4, low=0.1)
HALVES_AND_QUARTERS = np.arange(-10, 11, dtype=np.float32) / 4


def elementwise() -> list[Case]:
    cases: list[Case] = [(op, {"x": x, "y": y}) for op in BINARY + COMPARE for x, y in PAIRS]
    cases += [(op, {"x": ints(2, 3), "y": ints(3, seed=1, low=1)}) for op in BINARY + COMPARE if op != "real_div"]
    cases += [(op, {"x": halves(2, 3), "y": halves(2, 1, seed=1)}) for op in BINARY + COMPARE]
    cases += [(op, {"x": HALVES_AND_QUARTERS, "y": HALVES_AND_QUARTERS[::-1].copy()}) for op in COMPARE]
    cases += [("pow", {"x": POSITIVE, "y": y}) for y in (np.float32(-1.5), floats(4), np.float32(0))]
    cases += [("pow", {"x": ints(3, 3), "y": np.int32(2)})]
    cases += [(op, {"x": bools(3, 4), "y": bools(3, 4, seed=1)}) for op in LOGIC]
    cases += [("logical_not", {"x": bools(3, 4)})]
    cases += [(op, {"x": x}) for op in UNARY for x in (X, HALVES_AND_QUARTERS, halves(5, 3))]
    cases += [(op, {"x": floats(7, low=-0.99, high=0.99)}) for op in ("acos", "asin", "atanh")]
    cases += [(op, {"x": POSITIVE}) for op in ("sqrt", "log", "rsqrt", "inverse")]
    cases += [(op, {"x": POSITIVE, "epsilon": np.float32(0.5)}) for op in ("log", "rsqrt", "inverse")]
    cases += [(op, {"x": np.abs(halves(4, 3)), "epsilon": np.float16(1e-3)}) for op in ("log", "rsqrt", "inverse")]
    cases += [("clip", {"x": X, "alpha": -1.0, "beta": 1.5}), ("threshold", {"x": X, "alpha": 0.5})]
    kinds = ("fp16", "fp32", "int32", "bool", "int8", "uint8", "int16", "uint16")
    cases += [("cast", {"x": floats(2, 5, low=0, high=100), "dtype": d}) for d in kinds]
    cases += [("cast", {"x": HALVES_AND_QUARTERS, "dtype": d}) for d in ("int32", "int8", "bool", "fp16")]
    cases += [("cast", {"x": ints(3, 3, low=0), "dtype": d}) for d in ("fp32", "bool", "uint8")]
    cases += [("select", {"cond": bools(2, 3), "a": floats(2, 3), "b": floats(2, 3, seed=1)})]
    cases += [("select", {"cond": bools(3, 1), "a": floats(3, 4), "b": np.float32(7)})]
    return cases


def activations() -> list[Case]:
    channels = floats(3, seed=1)
    cases: list[Case] = [("gelu", {"x": x, "mode": m}) for x in (X, halves(5, 3)) for m in GELU]
    cases += [(op, {"x": X, "alpha": a}) for op in ("leaky_relu", "elu", "thresholded_relu") for a in (0.2, 1.5)]
    cases += [(op, {"x": X, "alpha": 0.4, "beta": 1.2}) for op in ("scaled_tanh", "sigmoid_hard", "linear_activation")]
    cases += [("clamped_relu", {"x": X, "alpha": 0.4, "beta": 1.2})]
    cases += [("prelu", {"x": floats(2, 3, 4, 2), "alpha": channels})]
    cases += [("prelu", {"x": floats(2, 3, *tail), "alpha": np.full(3, 0.3, np.float32)}) for tail in ((4,), (2, 2, 2))]
    cases += [("softplus_parametric", {"x": floats(2, 3, 2, 2), "alpha": channels, "beta": channels})]
    cases += [("softmax", {"x": x, "axis": a}) for x in (X, 30 * X, halves(4, 5)) for a in (-1, 0, 1)]
    return cases


GELU = ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")


def reductions() -> list[Case]:
    axes = ({}, {"axes": [1]}, {"axes": [-1], "keep_dims": True}, {"axes": [0, 2]}, {"axes": [2, 0], "keep_dims": True})
    cases: list[Case] = [(op, {"x": POSITIVE, **a}) for op in REDUCTIONS for a in axes]
    cases += [(op, {"x": ints(3, 4), "axes": [1]}) for op in REDUCTIONS[:6] if op != "reduce_mean"]
    cases += [(op, {"x": halves(3, 4), "axes": [1]}) for op in REDUCTIONS[:5]]
    for op in ("reduce_argmax", "reduce_argmin"):
        cases += [(op, {"x": X, "axis": a, "keep_dims": k}) for a in (-1, 0, 1) for k in (False, True)]
        cases += [(op, {"x": X, "output_dtype": "uint16"})]
    cases += [
        ("cumsum", {"x": x, "axis": a, "reverse": r}) for x in (X, ints(3, 4)) for a in (0, -1) for r in (False, True)
    ]
    cases += [("argsort", {"x": X, "axis": a, "ascending": f}) for a in (-1, 0, 1) for f in (False, True)]
    cases += [("topk", {"x": X, "k": k, "axis": a, "ascending": f}) for k, a, f in ((2, -1, False), (1, 1, True))]
    cases += [("topk", {"x": X, "k": 3, "return_indices": False})]
    return cases


def shapes() -> list[Case]:
    cube = floats(3, 4, 5)
    none, every = [0, 0, 0], [3, 4, 5]
    cases: list[Case] = [
        ("reshape", {"x": cube, "shape": s}) for s in ([12, 5], [-1], [0, -1], [1, 0, -1, 0], [3, 0, 5])
    ]
    cases += [("squeeze", {"x": floats(1, 3, 1), **a}) for a in ({}, {"axes": [0]}, {"axes": [-1, 0]})]
    cases += [("expand_dims", {"x": floats(3, 2), "axes": a}) for a in ([0], [-1], [1, 3], [0, -1])]
    cases += [("transpose", {"x": cube, "perm": p}) for p in ([2, 0, 1], [-1, 1, 0])]
    cases += [("flatten2d", {"x": cube, "axis": a}) for a in (1, -1, 2)]
    cases += [
        ("split", {"x": cube, "num_splits": 2, "axis": 1}),
        ("split", {"x": cube, "split_sizes": [1, 4], "axis": -1}),
    ]
    cases += [("stack", {"values": [X, X + 1, X + 2], "axis": a}) for a in (0, 1, -1)]
    cases += [("concat", {"values": [X, X + 1], "axis": a}) for a in (0, 1, -1)]
    cases += [("concat", {"values": [floats(2, 1), floats(2, 3)], "axis": 1}), ("concat", {"values": [X], "axis": 0})]
    cases += [("tile", {"x": floats(2, 3), "reps": r}) for r in ([1, 2], [3, 1])]
    cases += [("reverse", {"x": cube, **a}) for a in ({}, {"axes": [0]}, {"axes": [-1, 1]})]
    bounds = [
        {"begin": none, "end": every},
        {"begin": [1, 0, 2], "end": [3, 3, 5], "stride": [1, 2, 2]},
        {"begin": [-2, -3, 0], "end": [-1, 4, -1]},
        {"begin": [2, 3, 4], "end": [0, 0, 0], "stride": [-1, -2, -3]},
        {"begin": [1, 1, 1], "end": none, "begin_mask": [True, False, False], "end_mask": [True] * 3},
        {"begin": [1, 2, 0], "end": every, "squeeze_mask": [True, False, False]},
        {"begin": [1, -1, 0], "end": every, "squeeze_mask": [False, True, True]},
        {"begin": none, "end": none, "stride": [-1, 1, 1], "begin_mask": [True] * 3, "end_mask": [True] * 3},
    ]
    cases += [("slice_by_index", {"x": cube, **b}) for b in bounds]
    cases += [("slice_by_index", {"x": ints(3, 4, 5), **bounds[1]})]
    cases += [("slice_update", {"x": cube, "update": floats(2, 2, 2, seed=1), **bounds[1]})]
    cases += [("slice_update", {"x": cube, "update": floats(2, 2, 2, seed=1), **bounds[3]})]
    cases += [
        ("slice_by_size", {"x": cube, "begin": b, "size": s})
        for b, s in (([1, 0, -2], [2, 4, 1]), ([1, 1, 3], [-1, 2, -1]))
    ]
    cases += [("pad", {"x": cube, "pad": p, "mode": m}) for p in ([1, 2], [0, 1, 2, 0]) for m in PAD_MODES]
    cases += [("pad", {"x": cube, "pad": [1, 0, 0, 0, 0, 3], "constant_val": 2.5})]
    cases += [
        ("band_part", {"x": cube, "lower": a, "upper": b}) for a, b in ((-1, 0), (0, -1), (1, 1), (0, 0), (-1, -1))
    ]
    cases += [("shape", {"x": cube}), ("fill", {"shape": [2, 3], "value": 1.5}), ("fill", {"shape": [2], "value": 4})]
    cases += [("fill_like", {"ref_tensor": cube, "value": 2.0}), ("non_zero", {"x": ints(3, 4, low=0, high=2)})]
    cases += [("range_1d", {"start": a, "end": b, "step": c}) for a, b, c in ((0, 7, 2), (5, 0, -1), (0.5, 2.0, 0.25))]
    return cases


PAD_MODES = ("constant", "reflect", "replicate")


def indexing() -> list[Case]:
    cube, at = floats(3, 4, 5), ints(2, 2, low=0, high=3)
    cases: list[Case] = [("gather", {"x": cube, "indices": at, "axis": a}) for a in (0, 1, -1)]
    cases += [("gather", {"x": cube, "indices": i, "axis": 1}) for i in (np.int32(2), [3, 0, 0])]
    cases += [("gather", {"x": cube, "indices": [[0, 1], [1, 0], [3, 2]], "axis": 1, "batch_dims": 1})]
    cases += [("gather", {"x": ints(3, 4), "indices": np.array([2, 0], np.uint16), "validate_indices": True})]
    along = ints(3, 4, 5, low=0, high=3)
    cases += [("gather_along_axis", {"x": cube, "indices": along, "axis": a}) for a in (0, 1, -1)]
    once = {"data": floats(4, 3), "indices": [[2, 0, 1], [0, 1, 3]], "updates": floats(2, 3, seed=1)}
    cases += [("scatter_along_axis", {**once, "axis": 0, "mode": "update"})]
    return cases


def products() -> list[Case]:
    weight, bias = floats(5, 4, seed=1), floats(5, seed=2)
    cases: list[Case] = [("linear", {"x": x, "weight": weight, "bias": bias}) for x in (floats(4), X, floats(2, 4))]
    cases += [("linear", {"x": X, "weight": weight}), ("linear", {"x": halves(2, 4), "weight": halves(5, 4)})]
    flags = [{"transpose_x": a, "transpose_y": b} for a in (False, True) for b in (False, True)]
    cases += [("matmul", {"x": floats(2, 3, 3), "y": floats(3, 3, seed=1), **f}) for f in flags]
    cases += [("matmul", {"x": floats(2, 1, 3, 4), "y": floats(5, 4, 2, seed=1)})]
    cases += [("matmul", {"x": floats(4), "y": floats(4, 3)})]
    cases += [("matmul", {"x": floats(2, 4, 3), "y": floats(2, 5, 4), "transpose_x": True, "transpose_y": True})]
    cases += [("matmul", {"x": halves(3, 4), "y": halves(4, 2)})]
    cases += [("einsum", {"values": [floats(2, 3, 4, 5), floats(2, 5, 4, 6)], "equation": "nchw,nwhu->nchu"})]
    cases += [("einsum", {"values": [floats(3, 4, 5), floats(5, 4, 6)], "equation": "chw,whr->chr"})]
    for lead in ((2,), (2, 3)):
        q, k, v = floats(*lead, 4, 8), floats(*lead, 6, 8, seed=1), floats(*lead, 6, 5, seed=2)
        mask = bools(4, 6)
        mask[:, 0] = True  # a row that may look at nothing has no defined result
        attend = {"query": q, "key": k, "value": v}
        masks: tuple[dict[str, Any], ...] = ({}, {"attn_mask": mask}, {"attn_mask": floats(4, 6)})
        masks += ({"attn_mask": mask[:1]}, {"attn_mask": floats(2, *([1] * len(lead)), 6)})
        cases += [("scaled_dot_product_attention", {**attend, **m}) for m in masks]
    cases += [("layer_norm", {"x": X, "axes": [-1], "gamma": floats(4), "beta": floats(4, seed=1)})]
    cases += [("layer_norm", {"x": X, "axes": a, "epsilon": np.float32(1e-2)}) for a in ([1, 2], [1], [-1, -2])]
    cases += [("layer_norm", {"x": halves(3, 8), "axes": [-1]})]
    cases += [("l2_norm", {"x": floats(2, 3, 4, 5), "epsilon": np.float32(1e-4)})]
    return cases


def compressed() -> list[Case]:
    nibbles = lambda *shape, seed=0: ints(*shape, seed=seed, low=-8, high=8).astype(types.np_int4_dtype)  # noqa: E731
    data, scale, offset = ints(4, 6).astype(np.int8), floats(4, 1, low=0.1), ints(4, 1).astype(np.int8)
    cases: list[Case] = [("constexpr_blockwise_shift_scale", {"data": data, "scale": scale})]
    cases += [("constexpr_blockwise_shift_scale", {"data": data, "scale": scale, "offset": offset})]
    cases += [("constexpr_blockwise_shift_scale", {"data": data, "scale": floats(2, 3, low=0.1)})]
    cases += [("constexpr_blockwise_shift_scale", {"data": data.astype(np.uint8), "scale": halves(4, 1, low=0.1)})]
    for width in (64, 5):  # a row of 5 nibbles leaves half a byte
        blocks = {"data": nibbles(3, width), "scale": halves(3, max(width // 32, 1), low=0.1)}
        cases += [("constexpr_blockwise_shift_scale", blocks)]
        shift = nibbles(*blocks["scale"].shape, seed=1)
        cases += [("constexpr_blockwise_shift_scale", {**blocks, "offset": shift})]
    for bits in (1, 2, 3, 4, 6, 8):
        kind = types.type_mapping.string_to_nptype(f"uint{bits}")
        at = ints(6, 7, low=0, high=2**bits).astype(kind)
        for groups in ((1, 1), (3, 1), (2, 7)):
            cases += [("constexpr_lut_to_dense", {"indices": at, "lut": halves(*groups, 2**bits, 1)})]
        for axis in (0, 1, -1):
            vectors = {"lut": floats(1, 1, 2**bits, 3), "vector_axis": np.int32(axis)}
            cases += [("constexpr_lut_to_dense", {"indices": at, **vectors})]
    mask = bools(5, 7).astype(types.np_uint1_dtype)
    count = int(mask.sum())
    cases += [("constexpr_sparse_to_dense", {"nonzero_data": floats(count), "mask": mask})]
    cases += [("constexpr_sparse_to_dense", {"nonzero_data": halves(count), "mask": mask})]
    return cases


TABLES = (elementwise, activations, reductions, shapes, indexing, products, compressed)


def listed() -> list[Any]:
    numbered: dict[str, int] = {}
    params = []
    for op, arguments in (case for table in TABLES for case in table()):
        numbered[op] = numbered.get(op, -1) + 1
        params.append(pytest.param(op, arguments, id=f"{op}-{numbered[op]}"))
    return params


@pytest.mark.parametrize(("op", "arguments"), listed())
def test_as_coremltools_defines_it(op: str, arguments: Mapping[str, Any], tmp_path: Path) -> None:
    found, expected = results(op, arguments, tmp_path)
    assert len(found) == len(expected)
    half = any(getattr(a, "dtype", None) == np.float16 for a in arguments.values())
    for f, e in zip(found, expected, strict=True):
        assert e is not None, "coremltools does not compute this; hold it against a formula"
        hold(f, e, float16=half)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    return packing.pack_elements_into_bits(values, bits)


@pytest.mark.parametrize("opset", [ct.target.iOS16, ct.target.iOS17])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_older_tables(bits: int, opset: Any, tmp_path: Path) -> None:
    at = ints(5, 3, low=0, high=2**bits).astype(np.uint8)
    arguments = {"indices": packed(at.flatten(), bits), "lut": halves(2**bits), "shape": np.array([5, 3], np.uint32)}
    (found,), (expected,) = results("constexpr_lut_to_dense", arguments, tmp_path, opset)
    hold(found, expected)


@pytest.mark.parametrize("opset", [ct.target.iOS16, ct.target.iOS17])
def test_older_sparse_weights(opset: Any, tmp_path: Path) -> None:
    mask = bools(5, 7)
    values = floats(int(mask.sum()))
    bits = np.packbits(mask.flatten(), bitorder="little")
    arguments = {"nonzero_data": values, "mask": bits, "shape": np.array([5, 7], np.uint32)}
    (found,), (expected,) = results("constexpr_sparse_to_dense", arguments, tmp_path, opset)
    hold(found, expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_older_quantized_weights(kind: Any, axis: int, tmp_path: Path) -> None:
    data = ints(3, 4, 5, low=0, high=100).astype(kind)
    size = data.shape[axis]
    for scale, zero in ((floats(size), ints(size, low=0).astype(kind)), (np.float16(0.3), kind(7))):
        folder = tmp_path / np.asarray(scale).dtype.name
        folder.mkdir()
        arguments = {"quantized_data": data, "zero_point": zero, "scale": scale, "axis": np.int32(axis)}
        (found,), (expected,) = results("constexpr_affine_dequantize", arguments, folder, ct.target.iOS16)
        hold(found, expected)


@pytest.mark.parametrize("opset", [ct.target.iOS16, ct.target.iOS18])
def test_weights_stored_in_half(opset: Any, tmp_path: Path) -> None:
    arguments = {"source_val": halves(3, 20), "output_dtype": "fp32"}
    (found,), (expected,) = results("constexpr_cast", arguments, tmp_path, opset)
    hold(found, expected)


def sparse_cases() -> list[Case]:
    mask = bools(4, 6).astype(types.np_uint1_dtype)
    count = int(mask.sum())
    at = ints(count, low=0, high=4).astype(types.type_mapping.string_to_nptype("uint2"))
    lut = {"indices_mask": mask, "indices_nonzero_data": at}
    scaled = {"data_mask": mask, "nonzero_data": ints(count).astype(np.int8), "scale": floats(1, 6, low=0.1)}
    return [
        ("constexpr_lut_to_sparse", {**lut, "lut": halves(1, 1, 4, 1)}),
        ("constexpr_lut_to_sparse", {**lut, "lut": floats(2, 3, 4, 1)}),
        ("constexpr_lut_to_sparse", {**lut, "lut": floats(1, 1, 4, 2), "vector_axis": np.int32(0)}),
        ("constexpr_sparse_blockwise_shift_scale", scaled),
        ("constexpr_sparse_blockwise_shift_scale", {**scaled, "offset": ints(1, 6).astype(np.int8)}),
    ]


@pytest.mark.parametrize(("op", "arguments"), sparse_cases())
def test_sparse_and_compressed(op: str, arguments: Mapping[str, Any], tmp_path: Path) -> None:
    """They give the mask and the values that it sets."""
    found, expected = results(op, arguments, tmp_path)
    assert len(found) == len(expected) == 2
    hold(found[0], expected[0].astype(np.uint8))
    hold(found[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([d for d in DTYPES.values() if d.bits < 8 and d.bits]), st.integers(1, 70), st.integers(0, 99))
def test_packed_values(dtype: Any, count: int, seed: int) -> None:
    low = -(2 ** (dtype.bits - 1)) if dtype.is_signed else 0
    values = ints(count, seed=seed, low=low, high=low + 2**dtype.bits)
    stored = packed(values.astype(np.int8 if dtype.is_signed else np.uint8), dtype.bits).view(np.uint8)
    assert unpack(stored, dtype, count).tolist() == values.tolist()


@pytest.mark.parametrize("op", sorted(OPERATORS))
def test_parameters_are_those_of_coremltools(op: str) -> None:
    """All that any version of the operator takes; and what all versions require is required."""
    versions = {id(v): v for v in SSAOpRegistry.core_ops[op].values()}.values()
    taken = [v.input_spec.input_types for v in versions]
    have = OPERATORS[op].parameters
    assert set(have) == {name for spec in taken for name in spec}
    required = {n for n in have if all(n in spec and not spec[n].optional for spec in taken)}
    assert {n for n, p in have.items() if p.required} == required
