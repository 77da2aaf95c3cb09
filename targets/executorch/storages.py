"""How weights are kept that are no plain numbers: what XNNPACK multiplies with.

It has such weights for linear layers alone, and only together with activations that it rounds to eight bits, each row
of them with a range of its own, when they come in. Convolutions and tables of compressed weights with activations in
float32 it does not have: they would be expanded, or not run at all.
"""

from __future__ import annotations

import dataclasses

from toolchain.ir.affine import Affine
from toolchain.ir.dtypes import DTYPES
from toolchain.ir.storage import FLOAT32, Storage
from toolchain.ir.target import UnsupportedStorageError
from toolchain.ir.uses import Use

BLOCK = 32
"""Blocks of int4 are a multiple of this."""
SCALES = {8: DTYPES["float32"], 4: DTYPES["bfloat16"]}
"""Types of scales by bits."""
TAKES = f"it takes float32, symmetric int8 a channel, and symmetric int4 in blocks of a multiple of {BLOCK}"


def keep(asked: Storage, use: Use) -> Storage:
    """See :meth:`toolchain.ir.target.Target.keep`.

    Raises:
        UnsupportedStorageError: says what is taken.
    """
    if isinstance(asked, Affine) and use == "linear" and _takes(asked):
        return dataclasses.replace(asked, scale=SCALES[asked.bits])
    if asked != FLOAT32:
        raise UnsupportedStorageError(TAKES if use == "linear" else "it takes float32")
    return asked


def _takes(asked: Affine) -> bool:
    if not asked.symmetric:
        return False
    if asked.bits == 8:
        return asked.block is None
    return asked.bits == 4 and asked.block is not None and asked.block % BLOCK == 0
