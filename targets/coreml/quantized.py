"""Quantized weights in Core ML's programs: operators over constants that stand where a dense weight stood.

A block is converted with random stand-ins for the weights that are to be quantized. They tell which constant of the
converted program is which weight: one that the converter transposed, scaled or folded into something is not found,
and nothing is stored of it. So the structure of the program does not depend on the numbers either.

What comes into a linear layer that rounds it goes through ``quantize`` and ``dequantize``, with the layer's scale
and without a zero point: what coremltools' own ``linear_quantize_activations`` makes, and Core ML runs as a product of
int8 numbers where the processor has one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from targets.coreml.float16 import NAMESPACE
from toolchain.errors import LoweringError
from toolchain.ir.affine import SCALE, ZERO, Affine
from toolchain.ir.palette import INDICES, TABLE, Palette
from toolchain.ir.residual import LEFT, RIGHT, LowRank
from toolchain.ir.storage import VALUES, Narrow
from toolchain.ir.stored import encoded
from toolchain.ir.weights import Weight, quantized

PASS_NAME = "keep_quantized"
OWN_PASS = f"{NAMESPACE}::{PASS_NAME}"
SUFFIX = "_quantized"
QUANTIZE, DEQUANTIZE, INPUT_SCALE = "quantize", "dequantize", "input_scale"
HEAD = 16
"""Numbers by which a constant is told from others before all are looked at."""


class Quantized:
    """A block's quantized weights: the numbers that stand in for them, and their encoded parts, made once."""

    def __init__(self, weights: Mapping[str, Weight], values: Mapping[str, torch.Tensor]) -> None:
        self._values = values
        self.weights = quantized(weights)
        self._parts: dict[str, Mapping[str, torch.Tensor]] = {}

    def stand_in(self, name: str) -> torch.Tensor:
        """Random numbers of a weight's shape, the same whenever they are asked for, and no other weight's."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        return torch.randn(self.weights[name].shape, generator=torch.Generator().manual_seed(seed))

    def parts(self, name: str) -> Mapping[str, torch.Tensor]:
        """A weight's stored parts. They are kept: each function of a block needs them."""
        if name not in self._parts:
            self._parts[name] = encoded(name, self.weights[name], self._values)
        return self._parts[name]


class StandIns(Mapping[str, torch.Tensor]):
    """A block's weights as it is converted with: dense ones as they are, stand-ins for those that are quantized."""

    def __init__(self, quantized: Quantized, values: Mapping[str, torch.Tensor]) -> None:
        self._quantized, self._values = quantized, values

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._quantized.stand_in(name) if name in self._quantized.weights else self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Plan:
    """What is to be quantized in one function: weights, and how many operators of the exported program take each.

    Args:
        scales: by weight, what is divided by that comes into the layers which round it.
    """

    def __init__(
        self, quantized: Quantized, program: torch.export.ExportedProgram, scales: Mapping[str, torch.Tensor]
    ) -> None:
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.quantized, self.scales = quantized, scales
        self.uses = {
            names[node.name]: len(node.users)
            for node in program.graph.nodes
            if names.get(node.name) in quantized.weights and node.users
        }


def with_quantized(pipeline: ct.PassPipeline, plan: Plan) -> ct.PassPipeline:
    """``pipeline`` with :class:`KeepQuantized` at its end, where no other pass takes weights apart any more."""
    pipeline.passes = [*pipeline.passes, OWN_PASS]  # a new list: the old one is that of every default pipeline
    pipeline.set_options(OWN_PASS, {"plan": plan})
    return pipeline


@register_pass(namespace=NAMESPACE, name=PASS_NAME, override=True)
class KeepQuantized(AbstractGraphPass):
    """Puts an operator over a weight's parts in the place of the constant that stands in for it."""

    plan: Plan | None = None

    def apply(self, prog: Any) -> None:
        """Replace every weight of the plan.

        Raises:
            LoweringError: a weight is not in the program as it is, in one place; names it.
        """
        if self.plan is None:
            raise ValueError("the pass was given no plan")
        for function in prog.functions.values():
            with function:  # what is built is built into it
                _replace(function, self.plan)


def _replace(block: Any, plan: Plan) -> None:
    constants: dict[tuple[int, ...], list[Any]] = {}
    for op in block.operations:
        if op.op_type == "const" and isinstance(op.val.val, np.ndarray) and op.val.val.dtype.kind == "f":
            constants.setdefault(op.val.val.shape, []).append(op)
    for name, uses in plan.uses.items():
        weight = plan.quantized.weights[name]
        found = _found(plan.quantized.stand_in(name), constants.get(tuple(weight.shape), []))
        where = f"weight '{name}' is to be kept as {weight.storage}, but"
        if len(found) != 1:
            raise LoweringError(f"{where} the converted program has no constant that is it: it was changed or folded")
        (op,) = found
        if len(op.outputs[0].child_ops) != uses or op.outputs[0] in block.outputs:
            taken = len(op.outputs[0].child_ops)
            raise LoweringError(f"{where} {taken} of the {uses} operators that use it take it as it is")
        if name in plan.scales:
            _round_inputs(block, op, plan.scales[name], where)
        parts = plan.quantized.parts(name)
        if isinstance(weight.storage, LowRank):
            _add_product(block, op, parts, where)
            weight = dataclasses.replace(weight, storage=weight.storage.main)
            parts = {part: value for part, value in parts.items() if part not in (LEFT, RIGHT)}
        kept = _decompressed(op, weight, parts)
        block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=kept, force_replace=True)
        constants[tuple(weight.shape)].remove(op)
        block.remove_ops([op])


def _found(stand_in: torch.Tensor, constants: list[Any]) -> list[Any]:
    """The constants that are the stand-in, number by number, in their own type."""
    numbers, found = stand_in.numpy().reshape(-1), []
    for op in constants:
        value = op.val.val.reshape(-1)
        if all(np.array_equal(value[:n], numbers[:n].astype(value.dtype)) for n in (HEAD, len(value))):
            found.append(op)
    return found


def _add_product(block: Any, op: Any, parts: Mapping[str, torch.Tensor], where: str) -> None:
    """Add, to every linear layer that takes the constant ``op``, what the two thin matrices of its weight give.

    The sum has the layer's name, so that it still tells which step of the block computes it.

    Raises:
        LoweringError: another operator takes the constant; starts with ``where``.
    """
    left, right = (
        Builder.const(val=parts[part].numpy(), name=f"{op.name}_{part}", before_op=op) for part in (LEFT, RIGHT)
    )
    for user in _linear_users(op, where):
        name, result = user.outputs[0].name, user.outputs[0]
        main = Builder.linear(x=user.x, weight=user.weight, **_bias(user), name=f"{name}_main", before_op=user)
        thin = Builder.linear(x=user.x, weight=right, name=f"{name}_{RIGHT}", before_op=user)
        product = Builder.linear(x=thin, weight=left, name=f"{name}_{LEFT}", before_op=user)
        whole = Builder.add(x=main, y=product, name=name, before_op=user)
        block.replace_uses_of_var_after_op(anchor_op=user, old_var=result, new_var=whole)
        block.remove_ops([user])


def _round_inputs(block: Any, op: Any, scale: torch.Tensor, where: str) -> None:
    """Round what comes into every linear layer that takes the constant ``op`` to eight bits, in steps of ``scale``.

    The scale is named after the constant, which tells whose step of the block the rounding is part of.

    Raises:
        LoweringError: another operator takes the constant; starts with ``where``.
    """
    users = _linear_users(op, where)
    number = scale.numpy().astype(op.val.val.dtype)
    step = Builder.const(val=number, name=f"{op.name}_{INPUT_SCALE}", before_op=op)
    for user in users:
        name, result = user.outputs[0].name, user.outputs[0]
        whole = Builder.quantize(
            input=user.x, scale=step, output_dtype="int8", name=f"{name}_{QUANTIZE}", before_op=user
        )
        x = Builder.dequantize(input=whole, scale=step, name=f"{name}_{DEQUANTIZE}", before_op=user)
        again = Builder.linear(x=x, weight=user.weight, **_bias(user), name=name, before_op=user)
        block.replace_uses_of_var_after_op(anchor_op=user, old_var=result, new_var=again)
        block.remove_ops([user])


def _linear_users(op: Any, where: str) -> list[Any]:
    """The linear layers that take the constant ``op`` as their matrix.

    Raises:
        LoweringError: another operator takes it; starts with ``where``.
    """
    users = list(op.outputs[0].child_ops)
    if other := [user.op_type for user in users if user.op_type != "linear" or user.weight is not op.outputs[0]]:
        raise LoweringError(f"{where} an operator '{other[0]}' uses it, not a linear layer")
    return users


def _bias(user: Any) -> dict[str, Any]:
    """A linear layer's bias, as an argument for another one."""
    return {"bias": user.bias} if "bias" in user.inputs and user.bias is not None else {}


def _decompressed(op: Any, weight: Weight, parts: Mapping[str, torch.Tensor]) -> Any:
    """The value that Core ML makes of a weight's parts, before ``op``, which has the weight's name and type.

    Raises:
        LoweringError: this operator set has no way to say it, or the weight's type is not that of its scales.
    """
    storage, rank = weight.storage, len(weight.shape)
    given = {name: part.numpy() for name, part in parts.items()}
    name = op.name + SUFFIX
    if isinstance(storage, Narrow):
        return Builder.constexpr_cast(source_val=given[VALUES], output_dtype="fp32", name=name, before_op=op)
    if isinstance(storage, Affine):
        number = given[SCALE]
        kind = types.np_int4_dtype if storage.bits == 4 else np.int8
        arguments = {"data": given[VALUES].view(kind), "scale": number}
        arguments |= {} if storage.symmetric else {"offset": given[ZERO].view(kind)}
        build = Builder.constexpr_blockwise_shift_scale
    elif isinstance(storage, Palette):
        number = given[TABLE].reshape(-1, *[1] * (rank - 1), 1 << storage.bits, 1)
        kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{storage.bits}"))
        arguments = {"indices": given[INDICES].view(kind), "lut": number}
        build = Builder.constexpr_lut_to_dense
    else:
        raise LoweringError(f"a weight is to be kept as {storage}, which no operator of Core ML decodes")
    if number.dtype != op.val.val.dtype:
        raise LoweringError(f"'{name}' is computed in {op.val.val.dtype}, the scales of {storage} are {number.dtype}")
    return build(**arguments, name=name, before_op=op)
