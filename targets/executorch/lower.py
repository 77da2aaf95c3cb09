"""Lowering a block to an ExecuTorch program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass

from targets.exporting import export, reason
from targets.streams import quiet
from toolchain.blocks import Block
from toolchain.errors import LoweringError
from toolchain.target import Artifact, distinct_functions


def lower(block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    """One program with a method per function; the methods' equal weights are stored once."""
    functions = distinct_functions(block)
    with quiet():
        programs = {f: export(block, f, weights) for f in functions}
        try:
            edge = to_edge_transform_and_lower(programs, partitioner={f: [XnnpackPartitioner()] for f in functions})
            # methods are called one at a time, so they may share memory for their activations
            program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass()))
        except Exception as e:  # the converter raises whatever it likes
            raise LoweringError(f"block '{block.name}': ExecuTorch cannot lower it: {reason(e)}") from e
    with out.open("wb") as file:
        program.write_to_file(file)
    return Artifact(out, functions)
