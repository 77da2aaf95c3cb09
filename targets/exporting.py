"""Exporting a block's function, as all targets need it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolchain.blocks import Block
from toolchain.errors import LoweringError


def export(block: Block, function: str, weights: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """A function of ``block`` as an exported program, with fused attention and linear kept whole.

    Raises:
        LoweringError: names the block, the function and the operator.
    """
    args = tuple(torch.zeros(p.shape, dtype=p.dtype) for p in block.signatures[function].inputs)
    try:
        program = torch.export.export(block.module(function, weights), args, strict=False)
        # the empty table keeps attention, linear and gelu as they are; the default one takes them apart
        program = program.run_decompositions({})
        _drop_aliases(program)
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
