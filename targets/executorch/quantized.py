"""Linear layers over quantized weights, as XNNPACK takes them: int8 activations times small integers.

A block is lowered with random stand-ins for the parts of quantized weights, and the real parts are stamped into the
program. So what is stored are our integers and scales, no tool takes one part for another that has equal numbers, and
the structure does not depend on the numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators below)

from toolchain.errors import LoweringError
from toolchain.ir.affine import SCALE, Affine
from toolchain.ir.storage import VALUES
from toolchain.ir.stored import part_key
from toolchain.ir.weights import Weight

NAMESPACE = "quantized_decomposed"
OPERATORS = getattr(torch.ops, NAMESPACE)
LINEAR = torch.ops.aten.linear.default


def stand_ins(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """Random parts for quantized weights, no two of them equal, by key; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in weights.items():
        storage = _affine(weight)
        values, scale = (torch.Size(part.shape) for part in storage.parts(weight.shape))
        low, high = storage.lowest, storage.highest + 1
        found[part_key(name, VALUES)] = torch.randint(low, high, values, generator=generator, dtype=torch.int8)
        found[part_key(name, SCALE)] = (torch.randn(scale, generator=generator).abs() + 0.01).to(storage.scale.torch)
    return found


class Unset(Mapping[str, torch.Tensor]):
    """A block's weights to export it with: those that are quantized are never read, so they have no numbers."""

    def __init__(self, weights: Mapping[str, Weight], values: Mapping[str, torch.Tensor]) -> None:
        self._weights, self._values = weights, values

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.empty(self._weights[name].shape) if name in self._weights else self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def with_quantized(
    program: torch.export.ExportedProgram,
    weights: Mapping[str, Weight],
    parts: Mapping[str, torch.Tensor],
    where: str,
) -> fx.GraphModule:
    """The program's function with linear layers over the parts of ``weights``, and over activations in int8.

    It runs in eager mode, too, and computes what XNNPACK does.

    Raises:
        LoweringError: starts with ``where``; names a weight and an operator that is no linear layer and uses it.
    """
    module = program.module()
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"a program's module is a {type(module).__name__}")
    uses: dict[str, list[fx.Node]] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and node.target in weights and node.users:
            uses.setdefault(str(node.target), []).append(node)
    for number, (name, nodes) in enumerate(uses.items()):
        weight = weights[name]
        for node in nodes:
            for user in list(node.users):
                if user.target is not LINEAR or user.args[1] is not node or user.args[0] is node:
                    said = f"weight '{name}' is kept as {weight.storage}, which operator '{user.name}' cannot read"
                    raise LoweringError(f"{where}: {said}; keep it as float32")
                _round_activations(module.graph, user)
            _dequantize(module, node, _affine(weight), name, parts, f"quantized_{number}")
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _affine(weight: Weight) -> Affine:
    if not isinstance(weight.storage, Affine):
        raise ValueError(f"a weight is kept as {weight.storage}, which no plan gives the target")
    return weight.storage


def _round_activations(graph: fx.Graph, linear: fx.Node) -> None:
    """Put the rounding of what comes in before a linear layer: each row has its own range."""
    low, high = -128, 127
    with graph.inserting_before(linear):
        x = linear.args[0]
        found = graph.call_function(OPERATORS.choose_qparams_per_token_asymmetric.default, (x, torch.int8))
        scale, zero = (graph.call_function(operator.getitem, (found, i)) for i in range(2))
        rounded = graph.call_function(OPERATORS.quantize_per_token.default, (x, scale, zero, low, high, torch.int8))
        given = (rounded, scale, zero, low, high, torch.int8, torch.float32)
        linear.update_arg(0, graph.call_function(OPERATORS.dequantize_per_token.default, given))


def _dequantize(
    module: fx.GraphModule,
    node: fx.Node,
    storage: Affine,
    name: str,
    parts: Mapping[str, torch.Tensor],
    called: str,
) -> None:
    """Put the expansion of a weight's parts in the place of the weight ``node``."""
    scale = parts[part_key(name, SCALE)].float()
    scale = scale if storage.block else scale.reshape(-1)
    module.register_buffer(f"{called}_values", parts[part_key(name, VALUES)])
    module.register_buffer(f"{called}_scale", scale)
    module.register_buffer(f"{called}_zero", torch.zeros(scale.shape, dtype=torch.int8))
    graph, low, high = module.graph, storage.lowest, storage.highest
    with graph.inserting_before(node):
        values, scales, zero = (graph.get_attr(f"{called}_{part}") for part in ("values", "scale", "zero"))
        dense = (
            graph.call_function(
                OPERATORS.dequantize_per_channel_group.default,
                (values, scales, zero, low, high, torch.int8, storage.block, torch.float32),
            )
            if storage.block
            else graph.call_function(
                OPERATORS.dequantize_per_channel.default, (values, scales, zero, 0, low, high, torch.int8)
            )
        )
    node.replace_all_uses_with(dense)
    graph.erase_node(node)
