"""Which storages of weights the ONNX target takes, and their parts as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from targets.onnx import OnnxTarget
from targets.onnx.packing import packed
from targets.onnx.storages import specs
from targets.packing import PIECE
from toolchain.ir.affine import Affine
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.palette import Palette
from toolchain.ir.storage import BFLOAT16, FLOAT16, FLOAT32, Storage
from toolchain.ir.target import UnsupportedStorageError
from toolchain.ir.uses import Use
from toolchain.ir.weights import Weight, WeightSource

TARGET = OnnxTarget()
BLOCKS = r"blocks of 16, 32, 64, 128 or 256"
REFUSED: list[tuple[Storage, Use, str]] = [
    (Affine(4, block=8), "linear", f"it takes float32, and int8 and int4 a channel or in {BLOCKS}"),
    (Affine(8, block=48), "linear", f"in {BLOCKS}"),
    (Palette(4), "linear", f"in {BLOCKS}"),
    (FLOAT16, "other", "it takes float32"),
    (BFLOAT16, "convolution", "it takes float32, and int8 and int4 a channel"),
    (Affine(8, block=32), "convolution", "it takes float32, and int8 and int4 a channel"),
    (Affine(4), "embedding", f"it takes float32, int8 a channel, and int8 and int4 in {BLOCKS}"),
    (Affine(8), "other", "it takes float32"),
    (Palette(8), "embedding", f"in {BLOCKS}"),
]


@pytest.mark.parametrize(("storage", "use", "says"), REFUSED, ids=str)
def test_what_cannot_be_expressed_is_refused(storage: Storage, use: Use, says: str) -> None:
    with pytest.raises(UnsupportedStorageError) as error:
        TARGET.keep(storage, use)
    assert str(error.value).endswith(says)


def test_scales_are_float32() -> None:
    half = Affine(4, block=32, scale=DTYPES["float16"])
    assert TARGET.keep(half, "linear") == Affine(4, block=32)
    assert TARGET.keep(FLOAT32, "other") == FLOAT32


@pytest.mark.parametrize("count", [1, 2, 7, PIECE, 2 * PIECE + 3])
def test_nibbles(count: int) -> None:
    values = torch.randint(-8, 8, (3, count), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    rows = np.pad(values.numpy(), ((0, 0), (0, count % 2)))
    expected = ((rows[:, ::2] + 8) | ((rows[:, 1::2] + 8) << 4)).astype(np.uint8)
    assert np.array_equal(packed(values, "uint4").numpy(), expected)
    flat = np.pad(values.numpy().reshape(-1), (0, 3 * count % 2)).astype(np.uint8) & 15
    assert np.array_equal(packed(values, "int4").numpy(), flat[::2] | (flat[1::2] << 4))
    bytes_ = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    assert packed(bytes_, "uint8").tolist() == list(range(256))
    assert packed(bytes_, "int8") is bytes_


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_parts_are_packed_into_what_their_specs_say(bits: int, block: int | None, symmetric: bool) -> None:
    storage = Affine(bits, block=block, symmetric=symmetric)
    weight = Weight(WeightSource(("w",), (7, 96)), storage)
    parts = storage.encode(torch.randn(7, 96, generator=torch.Generator().manual_seed(0)))
    found = specs({"w": weight})
    assert set(found) == {f"w:{part}" for part in parts}
    for part, value in parts.items():
        assert packed(value, found[f"w:{part}"].form).nbytes == found[f"w:{part}"].bytes
