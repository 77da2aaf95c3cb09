"""Operators of the Core ML engine that coremltools does not compute, against their docstrings' formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_formulas as formulas
import numpy as np
import pytest
import test_coreml_ops
import torch
from one_op import Arguments, floats, halves, hold, ints, results

from targets.coreml.ops import OPERATORS

SPATIAL = [(7,), (6, 5), (4, 3, 5)]


def conv_cases() -> list[Arguments]:
    cases: list[Arguments] = []
    for sizes in SPATIAL:
        rank = len(sizes)
        base = {"x": floats(2, 4, *sizes), "weight": floats(6, 4, *[2, 3, 2][:rank], seed=1)}
        steps = {"strides": [2, 1, 2][:rank]}
        cases += [base, {**base, "bias": floats(6, seed=2), **steps}]
        cases += [{**base, **steps, "pad_type": kind} for kind in ("same", "same_lower", "valid")]
        cases += [{**base, **steps, "pad_type": "custom", "pad": [1, 2, 0, 1, 2, 2][: 2 * rank]}]
        cases += [{**base, "pad_type": "custom", "pad": [1] * 2 * rank}]
        cases += [{**base, "dilations": [2, 1, 2][:rank], "pad_type": kind} for kind in ("valid", "same")]
        cases += [{**base, "weight": floats(6, 2, *[3] * rank, seed=1), "groups": 2}]
        cases += [{**base, "weight": floats(4, 1, *[3] * rank, seed=1), "groups": 4, **steps}]
    return [*cases, {"x": halves(1, 2, 4, 4), "weight": halves(3, 2, 3, 3), "bias": halves(3)}]


def conv_transpose_cases() -> list[Arguments]:
    cases: list[Arguments] = []
    for sizes in SPATIAL:
        rank = len(sizes)
        base = {"x": floats(2, 4, *sizes), "weight": floats(4, 3, *[2, 3, 2][:rank], seed=1)}
        steps = {"strides": [2, 1, 2][:rank]}
        cases += [base, {**base, "bias": floats(3, seed=2), **steps}]
        cases += [{**base, **steps, "pad_type": "custom", "pad": [1, 0, 0, 1, 1, 1][: 2 * rank]}]
        cases += [{**base, **steps, "pad_type": "same"}]
        cases += [{**base, "weight": floats(4, 2, *[3] * rank, seed=1), "groups": 2, **steps}]
    return cases


def pool_cases() -> list[Arguments]:
    cases: list[Arguments] = []
    for sizes in SPATIAL:
        rank = len(sizes)
        base = {"x": floats(2, 2, *sizes), "kernel_sizes": [2, 3, 2][:rank], "strides": [2, 1, 2][:rank]}
        cases += [{**base, "pad_type": kind} for kind in ("valid", "same", "same_lower")]
        cases += [{**base, "pad_type": "custom", "pad": [1, 0, 1, 1, 0, 1][: 2 * rank]}]
        if rank < 3:
            cases += [{**base, "pad_type": "custom", "pad": [1, 1, 0, 0][: 2 * rank], "ceil_mode": True}]
    return cases


def moving_cases() -> list[tuple[str, Callable[[Arguments], Any], Arguments]]:
    deep, wide, odd = floats(2, 12, 2, 3), floats(2, 2, 4, 6), floats(2, 3, 4, 5)
    cases: list[tuple[str, Callable[[Arguments], Any], Arguments]] = [
        ("depth_to_space", formulas.depth_to_space, {"x": deep, "block_size": 2}),
        ("space_to_depth", formulas.space_to_depth, {"x": wide, "block_size": 2}),
        ("pixel_shuffle", formulas.pixel_shuffle, {"x": deep, "upscale_factor": 2}),
        ("pixel_unshuffle", formulas.pixel_unshuffle, {"x": wide, "downscale_factor": np.uint32(2)}),
        ("crop", lambda a: a["x"][..., 1:3, 2:5], {"x": odd, "crop_height": [1, 1], "crop_width": [2, 0]}),
        ("silu", lambda a: a["x"] / (1 + np.exp(-a["x"])), {"x": odd}),
        ("silu", lambda a: a["x"] / (1 + np.exp(-a["x"].astype(np.float32))), {"x": halves(3, 5)}),
    ]
    blocks = {"block_shape": [2, 3], "paddings": np.array([[1, 1], [0, 3]], np.int32)}
    cases += [("space_to_batch", formulas.space_to_batch, {"x": floats(2, 2, 4, 6), **blocks})]
    blocks = {"block_shape": [2, 3], "crops": np.array([[1, 0], [2, 1]], np.int32)}
    cases += [("batch_to_space", formulas.batch_to_space, {"x": floats(12, 2, 2, 3), **blocks})]
    for axis, size, stride in ((1, 2, 1), (-1, 3, 2)):
        windows = {"x": odd, "axis": axis, "size": size, "stride": stride}
        cases += [("sliding_windows", formulas.sliding_windows, windows)]
    for axis in (0, 1, -1):
        cases += [("concat", formulas.interleave, {"values": [odd, odd + 1], "axis": axis, "interleave": True})]
    for lengths, along, batch in (([1, 4, 0], 1, 0), ([2, 1, 4], 0, 1)):
        x = floats(3, 4, 2) if batch == 0 else floats(4, 3, 2)
        order = {"lengths": lengths, "seq_axis": along, "batch_axis": batch}
        cases += [("reverse_sequence", formulas.reverse_sequence, {"x": x, **order})]
    like = {"ref_tensors": [floats(2, 3, 4), floats(1, 5, 6)], "begins": [0, 1], "ends": [2, 0]}
    like |= {"x": floats(180), "end_masks": [False, True]}
    cases += [("reshape_like", lambda a: a["x"].reshape(2, 3, 5, 6), like)]
    for axis in (-1, 0, 1):
        hot = {
            "indices": ints(2, 3, low=0, high=4),
            "one_hot_vector_size": 4,
            "axis": axis,
            "on_value": 2.5,
            "off_value": -1.0,
        }
        cases += [("one_hot", lambda a: one_hot(a), hot)]
    return cases


def one_hot(a: Arguments) -> Any:
    values = np.where(np.arange(4) == a["indices"][..., None], a["on_value"], a["off_value"]).astype(np.float32)
    return np.moveaxis(values, -1, a["axis"])


def image_cases() -> list[tuple[str, Callable[[Arguments], Any], Arguments]]:
    x = floats(2, 3, 4, 5)
    cases: list[tuple[str, Callable[[Arguments], Any], Arguments]] = []
    for mode, grid in formulas.GRIDS.items():
        for height, width in ((8, 7), (3, 2), (1, 1)):
            size = {"target_size_height": height, "target_size_width": width}
            bilinear = lambda a, s=(height, width), g=grid: formulas.interpolated(a["x"], *s, g)  # noqa: E731
            cases += [("resize_bilinear", bilinear, {"x": x, **size, "sampling_mode": mode})]
    for height, width in ((8, 7), (3, 2)):
        size = {"target_size_height": height, "target_size_width": width}
        near = lambda a, s=(height, width): formulas.nearest(a["x"], *s)  # noqa: E731
        cases += [("resize_nearest_neighbor", near, {"x": x, **size})]
    for tall, broad in ((2, 2), (3, 1), (1.5, 2.0)):
        scale = {"scale_factor_height": tall, "scale_factor_width": broad}
        near = lambda a, s=(int(4 * tall), int(5 * broad)): formulas.nearest(a["x"], *s)  # noqa: E731
        cases += [("upsample_nearest_neighbor", near, {"x": x, **scale})]
        corners: tuple[dict[str, Any], ...] = ({}, {"align_corners": False})
        corners += ({"align_corners": False, "half_pixel_centers": False},)
        cases += [("upsample_bilinear", formulas.upsample_bilinear, {"x": x, **scale, **c}) for c in corners]
    return cases


def norm_cases() -> list[tuple[str, Callable[[Arguments], Any], Arguments]]:
    cases: list[tuple[str, Callable[[Arguments], Any], Arguments]] = []
    for sizes in ((5,), (4, 3), (2, 3, 2)):
        x, c = floats(2, 3, *sizes), {"gamma": floats(3, seed=1), "beta": floats(3, seed=2)}
        cases += [("instance_norm", instance_norm, {"x": x, **c, "epsilon": np.float32(1e-3)})]
        cases += [("instance_norm", instance_norm, {"x": x})]
        given = {"mean": floats(3, seed=3), "variance": floats(3, seed=4, low=0.1)}
        cases += [("batch_norm", batch_norm, {"x": x, **given, **c})]
    for size in (3, 4):
        terms = {"size": size, "alpha": np.float32(0.5), "beta": np.float32(0.6), "k": np.float32(1.5)}
        cases += [("local_response_norm", local_response_norm, {"x": floats(2, 6, 3, 2), **terms})]
    return cases


def per_channel(values: Any, x: Any) -> Any:
    return np.asarray(values).reshape(-1, *[1] * (x.ndim - 2))


def affine(y: Any, a: Arguments) -> Any:
    gamma, beta = a.get("gamma", np.ones(3)), a.get("beta", np.zeros(3))
    return (per_channel(gamma, y) * y + per_channel(beta, y)).astype(np.float32)


def instance_norm(a: Arguments) -> Any:
    x, axes = a["x"].astype(np.float64), tuple(range(2, a["x"].ndim))
    y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + a.get("epsilon", 1e-5))
    return affine(y, a)


def batch_norm(a: Arguments) -> Any:
    x = a["x"].astype(np.float64)
    return affine((x - per_channel(a["mean"], x)) / np.sqrt(per_channel(a["variance"], x) + 1e-5), a)


def local_response_norm(a: Arguments) -> Any:
    x, size = a["x"], a["size"]
    sums = np.zeros_like(x)
    for c in range(x.shape[1]):
        sums[:, c] = (x[:, max(c - size // 2, 0) : c + (size - 1) // 2 + 1] ** 2).sum(1)
    return x / (a["k"] + a["alpha"] / size * sums) ** a["beta"]


def scatter_cases() -> list[tuple[str, Callable[[Arguments], Any], Arguments]]:
    cases: list[tuple[str, Callable[[Arguments], Any], Arguments]] = []
    data = floats(4, 3, 2)
    for mode in formulas.MODES:
        for axis, at in ((0, [3, 0]), (1, [2]), (-1, [1, 0])):
            updates = floats(*(len(at) if i == axis % 3 else n for i, n in enumerate(data.shape)), seed=1, low=0.5)
            places = {"indices": np.array(at, np.int32), "updates": updates}
            cases += [("scatter", formulas.scatter, {"data": data, **places, "axis": axis, "mode": mode})]
        at = np.array([[2, 0, 1], [0, 1, 3]], np.int32)
        along = {"data": floats(4, 3), "indices": at, "updates": floats(2, 3, seed=1, low=0.5)}
        cases += [("scatter_along_axis", formulas.scatter_along_axis, {**along, "axis": 0, "mode": mode})]
        for nd in ([[3, 1], [0, 2]], [[2], [0]]):
            at = np.array(nd, np.int32)
            updates = floats(2, *data.shape[at.shape[-1] :], seed=1, low=0.5)
            cases += [
                ("scatter_nd", formulas.scatter_nd, {"data": data, "indices": at, "updates": updates, "mode": mode})
            ]
    twice = {"data": data, "indices": np.array([1, 1], np.int32), "updates": floats(2, 3, 2, seed=1)}
    cases += [("scatter", formulas.scatter, {**twice, "axis": 0, "mode": "add"})]
    for at, batch in (([[3, 1], [0, 2]], 0), ([[2], [0]], 0), ([[[1], [0]]] * 4, 1), ([[[1, 0]]] * 4, 1)):
        where = {"x": data, "indices": np.array(at, np.int32), "batch_dims": batch}
        cases += [("gather_nd", formulas.gather_nd, where)]
    return cases


def quantized_cases() -> list[tuple[str, Callable[[Arguments], Any], Arguments]]:
    data, scale, zero = ints(3, 4).astype(np.int8), floats(4, low=0.1), ints(4, seed=1).astype(np.int8)
    return [
        ("dequantize", lambda a: a["input"] * a["scale"], {"input": data, "scale": scale, "axis": 1}),
        (
            "dequantize",
            lambda a: (a["input"].astype(np.float32) - a["zero_point"]) * a["scale"],
            {"input": data, "scale": scale, "zero_point": zero, "axis": 1},
        ),
        ("dequantize", lambda a: a["input"] * a["scale"], {"input": data, "scale": np.float32(0.25)}),
        ("quantize", quantize, {"input": floats(3, 4, high=9), "scale": scale, "zero_point": zero, "axis": 1}),
        ("quantize", quantize, {"input": floats(3, 4), "scale": np.float32(0.01), "zero_point": np.int8(3)}),
    ]


def quantize(a: Arguments) -> Any:
    return np.clip(np.round(a["input"] / a["scale"]) + a["zero_point"], -128, 127).astype(np.int8)


def all_cases() -> list[Any]:
    cases = [("conv", formulas.conv, c) for c in conv_cases()]
    cases += [("conv_transpose", formulas.conv_transpose, c) for c in conv_transpose_cases()]
    pools = [(op, formula, c) for op, formula in formulas.POOLS.items() for c in pool_cases()]
    cases += [p for p in pools if p[0] != "l2_pool" or len(p[2]["kernel_sizes"]) < 3]
    cases += [("avg_pool", formulas.POOLS["avg_pool"], {**c, EXCLUDE: True}) for c in pool_cases()]
    for table in (moving_cases, image_cases, norm_cases, scatter_cases, quantized_cases):
        cases += table()
    return [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(cases)]


EXCLUDE = "exclude_padding_from_average"


@pytest.mark.parametrize(("op", "formula", "arguments"), all_cases())
def test_as_its_formula_says(
    op: str, formula: Callable[[Arguments], Any], arguments: Arguments, tmp_path: Path
) -> None:
    extra = {"output_dtype": "int8"} if op == "quantize" else {}
    (found,), _ = results(op, {**arguments, **extra}, tmp_path)
    expected = formula(arguments)
    hold(found, expected, float16=any(getattr(a, "dtype", None) == np.float16 for a in arguments.values()))


def test_every_operator_is_held_against_something() -> None:
    tables = {op for table in test_coreml_ops.TABLES for op, _ in table()} | {c.values[0] for c in all_cases()}
    older = {"constexpr_affine_dequantize", "constexpr_cast"} | {op for op, _ in test_coreml_ops.sparse_cases()}
    assert OPERATORS.keys() == tables | older


# --- what coremltools cannot build, or builds wrongly -------------------------------------------------


def call(op: str, **arguments: Any) -> Any:
    return OPERATORS[op].call(**arguments)


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_that_leave_each_element_out(reverse: bool) -> None:
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    found = call("cumsum", x=x, axis=1, exclusive=True, reverse=reverse)
    assert found.tolist() == ([[6, 4, 0], [48, 32, 0]] if reverse else [[0, 1, 3], [0, 8, 24]])


def test_all_of_the_largest() -> None:
    values, indices = call("topk", x=torch.tensor([3.0, 9.0, 5.0]), k=-1)
    assert (values.tolist(), indices.tolist()) == ([9, 5, 3], [1, 2, 0])


def test_products_with_a_vector() -> None:
    x, y = torch.from_numpy(floats(2, 3, 4)), torch.from_numpy(floats(4, seed=1))
    assert torch.allclose(call("matmul", x=x, y=y, transpose_y=True), (x * y).sum(-1))


@pytest.mark.parametrize("op", ["gather", "gather_along_axis"])
@pytest.mark.parametrize(("index", "validate"), [(4, False), (-5, False), (-1, True)])
def test_an_index_out_of_bounds(op: str, index: int, validate: bool) -> None:
    with pytest.raises(IndexError, match=rf"index {index} is out of bounds for size 4"):
        call(op, x=torch.arange(4.0), indices=torch.tensor([0, index]), validate_indices=validate)


@pytest.mark.parametrize("padding", [[1, 0], [0, 0]])
@pytest.mark.parametrize("size", [6, 7])
def test_a_transposed_convolution_of_given_size(size: int, padding: list[int]) -> None:
    """As PyTorch has it with ``output_padding``: what the input does not reach is only the bias."""
    x, weight, bias = (torch.from_numpy(floats(*s)) for s in ((1, 2, 3), (2, 1, 2), (1,)))
    given = {"pad_type": "custom", "pad": padding, "strides": [2], "output_shape": [1, 1, size]}
    found = call("conv_transpose", x=x, weight=weight, bias=bias, **given)
    whole = torch.nn.functional.conv_transpose1d(x, weight, None, 2)
    expected = torch.nn.functional.pad(whole, (0, 4))[..., padding[0] : padding[0] + size] + bias
    assert torch.allclose(found, expected)
