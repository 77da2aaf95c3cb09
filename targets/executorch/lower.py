"""Lowering a block to an ExecuTorch program."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.utils import WhyNoPartition, is_same_node
from executorch.exir.passes import MemoryPlanningPass

from targets.executorch.quantized import NAMESPACE, Unset, stand_ins, with_quantized
from targets.executorch.stamp import bind, stamp
from targets.exporting import export, reason
from targets.streams import quiet
from targets.unused import unused_left_out
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block
from toolchain.ir.stored import StoredParts
from toolchain.ir.target import Artifact, UnboundTemplateError, distinct_functions
from toolchain.ir.weights import quantized

CONFIGS = "executorch.backends.xnnpack.partition.config"


def lower(block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
    """One program with a method per function; the methods' equal weights are stored once, quantized ones as parts.

    Raises:
        LoweringError: names the block and, where known, the function, the operator or the weight.
    """
    kept = quantized(block.weights)
    if not kept:
        _lower(block, weights, {}, out)
        return Artifact(out, distinct_functions(block))
    parts, plain = stand_ins(kept), Unset(kept, weights)
    before = out.with_name(f".{out.name}.stand-ins")
    try:
        _lower(block, plain, parts, before)
        template = bind(Artifact(before, distinct_functions(block)), parts)
        return stamp(template, StoredParts(kept, weights), out)
    except UnboundTemplateError as e:
        raise LoweringError(f"block '{block.name}': quantized weights are not in the program as they are: {e}") from e
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    finally:
        before.unlink(missing_ok=True)


def _lower(block: Block, weights: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write a block's program; quantized weights have ``parts``."""
    functions = distinct_functions(block)
    weights = dict(weights)  # made once: functions share them
    with quiet(), unused_left_out():
        programs = {f: _exported(block, f, weights, parts) for f in functions}
        try:
            edge = to_edge_transform_and_lower(programs, partitioner={f: [XnnpackPartitioner()] for f in functions})
            _hold_delegated(edge, block, functions)
            # methods are called one at a time, so they may share memory for their activations
            program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass()))
        except LoweringError:
            raise
        except Exception as e:  # the converter raises whatever it likes
            raise LoweringError(f"block '{block.name}': ExecuTorch cannot lower it: {reason(e)}") from e
        finally:
            _forget()
    with out.open("wb") as file:
        program.write_to_file(file)


def _exported(
    block: Block, function: str, weights: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    program = export(block, function, weights)
    if not parts:
        return program
    where = f"block '{block.name}', function '{function}'"
    module = with_quantized(program, quantized(block.weights), parts, where)
    _drop_origins(module.graph)
    args = tuple(torch.zeros(p.shape, dtype=p.dtype) for p in block.signatures[function].inputs)
    try:
        program = torch.export.export(module, args, strict=False).run_decompositions({})
    except Exception as e:
        raise LoweringError(f"{where}: cannot export its quantized form: {reason(e)}") from e
    _drop_origins(program.graph)
    return program


def _drop_origins(graph: torch.fx.Graph) -> None:
    """Forget what nodes were made from: exporting twice makes long chains of that, and every pass copies them."""
    for node in graph.nodes:
        node.meta.pop("from_node", None)


def _hold_delegated(edge: Any, block: Block, functions: tuple[str, ...]) -> None:
    """XNNPACK has taken every quantized layer: nothing else expands weights, and phones may have no kernels for it."""
    for function in functions:
        for node in edge.exported_program(function).graph.nodes:
            if node.op == "call_function" and NAMESPACE in str(node.target):
                where = f"block '{block.name}', function '{function}'"
                raise LoweringError(
                    f"{where}: XNNPACK does not take the quantized layer of '{node.name}'; keep it as float32"
                )


def _forget() -> None:
    """Make the partitioner let go of what it was given: it remembers nodes, and these hold all weights."""
    is_same_node.cache_clear()
    for name, module in list(sys.modules.items()):
        if name.startswith(CONFIGS) and isinstance(why := getattr(module, "why", None), WhyNoPartition):
            why.node = None
