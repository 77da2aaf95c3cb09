"""Programs of ``torch.export`` whose weights are their first argument: a file has the code alone, always the same."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx, nn

from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block


class _WithWeights(nn.Module):
    """A module that is called with its weights, by name, and then its inputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__["_module"] = module  # not a part, or its own weights would be exported too

    def forward(self, weights: Mapping[str, torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results: tuple[torch.Tensor, ...] = torch.func.functional_call(self.__dict__["_module"], weights, inputs)
        return results


def write_program(block: Block, function: str, path: Path) -> None:
    """Export a function of ``block``; no number of its weights has a part in it.

    Raises:
        LoweringError: it cannot be exported.
    """
    inputs = [torch.zeros(p.shape, dtype=p.dtype) for p in block.signatures[function].inputs]
    weights = {name: torch.zeros(w.shape) for name, w in block.weights.items()}
    module = block.module(function, weights)
    try:
        program = torch.export.export(_WithWeights(module), (weights, *inputs), strict=False)
    except Exception as e:  # torch raises whatever it likes
        said = " ".join(str(e).split())[:300]
        raise LoweringError(f"block '{block.name}', function '{function}': cannot export: {said}") from e
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has paths of this machine
    file = io.BytesIO()
    torch.export.save(program, file)
    path.write_bytes(file.getvalue())


def read_program(path: Path) -> nn.Module:
    """A program, called with the weights by name and then the inputs.

    Raises:
        LoweringError: it cannot be read.
    """
    try:
        return torch.export.load(path).module()
    except Exception as e:
        said = " ".join(str(e).split())[:200]
        raise LoweringError(f"'{path.parent.name}/{path.name}' cannot be read: {said}; lower the block again") from e
