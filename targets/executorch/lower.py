"""Lowering a block to an ExecuTorch program."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.utils import WhyNoPartition, is_same_node
from executorch.exir.passes import MemoryPlanningPass

from targets.exporting import export, reason
from targets.streams import quiet
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block
from toolchain.ir.target import Artifact, distinct_functions

CONFIGS = "executorch.backends.xnnpack.partition.config"


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
        finally:
            _forget()
    with out.open("wb") as file:
        program.write_to_file(file)
    return Artifact(out, functions)


def _forget() -> None:
    """Make the partitioner let go of what it was given: it remembers nodes, and these hold all weights."""
    is_same_node.cache_clear()
    for name, module in list(sys.modules.items()):
        if name.startswith(CONFIGS) and isinstance(why := getattr(module, "why", None), WhyNoPartition):
            why.node = None
