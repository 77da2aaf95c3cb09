"""How weights are kept that are no plain numbers: what ONNX Runtime can read, and as what each part is stored.

A channel's integers with one scale are what ONNX itself has an operator for, ``DequantizeLinear``, which takes them
signed. Blocks are read by ONNX Runtime's own ``MatMulNBits`` and ``GatherBlockQuantized``, which take them unsigned,
the zero in the middle. So the storage alone decides what lies in the file, whatever uses the weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from toolchain.ir.affine import SCALE, ZERO, Affine
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.residual import LEFT, RIGHT, LowRank
from toolchain.ir.storage import FLOAT32, VALUES, Storage
from toolchain.ir.stored import part_key
from toolchain.ir.target import UnsupportedStorageError
from toolchain.ir.uses import Use
from toolchain.ir.weights import Weight

BLOCKS = (16, 32, 64, 128, 256)
"""What ``MatMulNBits`` has kernels for on all of ONNX Runtime's processors."""
_BLOCKS = f"blocks of {', '.join(map(str, BLOCKS[:-1]))} or {BLOCKS[-1]}"
TAKES: Mapping[Use, str] = {
    "linear": f"it takes float32, and int8 and int4 a channel or in {_BLOCKS}",
    "convolution": "it takes float32, and int8 and int4 a channel",
    "embedding": f"it takes float32, int8 a channel, and int8 and int4 in {_BLOCKS}",
    "other": "it takes float32",
}

Form = Literal["float32", "int8", "int4", "uint8", "uint4"]
"""What a part's numbers are written as; ``uint4`` is two in a byte, each row by itself, and declared as bytes."""


@dataclass(frozen=True)
class Spec:
    """A part as a model declares it: of unsigned nibbles, ``shape`` counts the bytes."""

    form: Form
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        bits = {"float32": 32, "int4": 4}.get(self.form, 8)
        return -(-math.prod(self.shape) * bits // 8)


def keep(asked: Storage, use: Use) -> Storage:
    """See :meth:`toolchain.ir.target.Target.keep`.

    Raises:
        UnsupportedStorageError: says what is taken.
    """
    if isinstance(asked, LowRank):
        main = keep(asked.main, use)
        if use != "linear" or not isinstance(main, Affine):
            raise UnsupportedStorageError(f"it takes {main} without a rank")
        return dataclasses.replace(asked, main=main)
    if isinstance(asked, Affine) and _takes(asked, use):
        return dataclasses.replace(asked, scale=DTYPES["float32"])
    if asked != FLOAT32:
        raise UnsupportedStorageError(TAKES[use])
    return asked


def _takes(asked: Affine, use: Use) -> bool:
    if asked.bits not in (4, 8) or use == "other":
        return False
    if asked.block is None:
        return use != "embedding" or asked.bits == 8  # nothing looks up rows of two numbers a byte by their channel
    return asked.block in BLOCKS and use != "convolution"


def specs(weights: Mapping[str, Weight]) -> dict[str, Spec]:
    """The parts of weights, by key."""
    return {part_key(n, part): spec for n, w in weights.items() for part, spec in _specs(w.storage, w.shape).items()}


def _specs(storage: Storage, shape: tuple[int, ...]) -> dict[str, Spec]:
    if storage == FLOAT32:
        return {"": Spec("float32", shape)}
    if isinstance(storage, LowRank):
        thin = {p.name: Spec("float32", p.shape) for p in storage.parts(shape) if p.name in (LEFT, RIGHT)}
        return _specs(storage.main, shape) | thin
    if not isinstance(storage, Affine):
        raise ValueError(f"a weight is kept as {storage}, which no plan gives the target")
    rows, bits = shape[0], storage.bits
    if storage.block is None:
        form: Form = "int8" if bits == 8 else "int4"
        parts = {VALUES: Spec(form, shape), SCALE: Spec("float32", (rows,)), ZERO: Spec(form, (rows,))}
    else:
        form = "uint8" if bits == 8 else "uint4"
        blocks = shape[1] // storage.block
        parts = {
            VALUES: Spec(form, (rows, blocks, storage.block * bits // 8)),
            SCALE: Spec("float32", (rows, blocks)),
            ZERO: Spec(form, (rows, -(-blocks * bits // 8))),
        }
    if storage.symmetric:
        del parts[ZERO]
    return parts
