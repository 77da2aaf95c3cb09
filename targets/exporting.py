"""Exporting a block's function, as all targets need it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, copied
from toolchain.ir.target import STEP


def export(block: Block, function: str, weights: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """A function of ``block`` as an exported program, with fused attention and linear kept whole.

    Every operator is named after the step of the block that it is part of (``LEAF__linear_3``, parted by
    :data:`toolchain.ir.target.STEP`): converters keep names, so a value in an artifact tells which leaf computed it.

    Raises:
        LoweringError: names the block, the function and the operator.
    """
    args = tuple(torch.zeros(p.shape, dtype=p.dtype) for p in block.signatures[function].inputs)
    try:
        steps = _as_modules(block.module(function, weights))
        program = torch.export.export(steps, args, strict=False)
        # the empty table keeps attention, linear and gelu as they are; the default one takes them apart
        program = program.run_decompositions({})
        _drop_aliases(program)
        _name_after_steps(program, steps)
    except Exception as e:
        raise LoweringError(f"block '{block.name}', function '{function}': cannot export: {reason(e)}") from e
    return program


def reason(error: Exception) -> str:
    """What a converter said, on one line, cut where it starts to explain itself."""
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__


def _drop_aliases(program: torch.export.ExportedProgram) -> None:
    """Remove ``alias``: what slicing a whole dimension exports to, and what no runtime has a kernel for."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            source = node.args[0]
            node.replace_all_uses_with(source)
            program.graph_signature.replace_all_uses(node.name, source.name)
            program.graph.erase_node(node)
    program.graph_module.recompile()


class _Call(nn.Module):
    """A function as a module, so that exporting records where each operator comes from."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def _as_modules(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with every function of its graph called as a module named like its node."""
    graph = copied(gm.graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            gm.add_submodule(node.name, _Call(node.target))
            node.op, node.target = "call_module", node.name
    return fx.GraphModule(gm, graph, class_name=type(gm).__name__)


def _name_after_steps(program: torch.export.ExportedProgram, steps: fx.GraphModule) -> None:
    """Rename operators to ``STEP__OPERATOR``, with the step's path written with underscores."""
    paths = {str(n.target) for n in steps.graph.nodes if n.op == "call_module"}
    for node in program.graph.nodes:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path in paths]
        if node.op == "call_function" and stack:
            before = node.name
            node._rename(f"{stack[0].replace('.', '_')}{STEP}{before}")
            program.graph_signature.replace_all_uses(before, node.name)
    program.graph_module.recompile()
