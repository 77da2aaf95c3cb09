"""What operators do to memory in ONNX Runtime, on a CPU and without its arena.

Measured on single operators: values are freed one operator after the last that reads them (:data:`FREED_LATE`);
reshaping costs nothing, but slices and transposes are copies; attention holds its scores once, and a mask with a row
for every query. A matrix that is kept as integers with a scale a channel is expanded while it is multiplied with
(``DequantizeLinear``); blocks and tables that are looked up are read as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from toolchain.ir.affine import Affine
from toolchain.ir.blocks import Block
from toolchain.ir.memory import Effect
from toolchain.ir.operators import Operator, Value
from toolchain.ir.residual import LowRank

FREED_LATE = 1
RESHAPES = frozenset({"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"})
IN_PLACE = frozenset({"softmax", "relu"})
FLOAT32_BYTES = 4


def effect(operator: Operator, block: Block, size: Callable[[Value], int]) -> Effect:
    """See :meth:`toolchain.ir.target.Target.effect`."""
    if operator.name in RESHAPES:
        return Effect(view=True)
    scratch = _expanded(operator, block)
    if operator.name == "scaled_dot_product_attention":
        query, key = operator.reads[:2]
        rows = size(query) // query.shape[-1]
        scratch += rows * key.shape[-2]
        if len(operator.reads) > 3 and operator.reads[3].shape[-2] == 1:
            scratch += size(operator.reads[3]) * query.shape[-2]
    return Effect(in_place=operator.name in IN_PLACE, scratch=scratch)


def _expanded(operator: Operator, block: Block) -> int:
    if operator.name == "embedding":
        return 0
    weights = [block.weights[v.weight] for v in operator.reads if v.weight is not None and v.weight in block.weights]
    found = 0
    for weight in weights:
        storage = weight.storage.main if isinstance(weight.storage, LowRank) else weight.storage
        if isinstance(storage, Affine) and storage.block is None:
            found += math.prod(weight.shape) * FLOAT32_BYTES
    return found
