"""Values that depend on no input (positions, the null prompt): computed with the checkpoint's numbers when building."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from toolchain.errors import CheckpointError, LoweringError
from toolchain.formats.bundle import describe_file
from toolchain.formats.manifest import File
from toolchain.ir.blocks import table_nodes
from toolchain.ir.graph import Graph
from toolchain.planning.plan import ComponentPlan, Plan
from toolchain.system.store import key_of
from toolchain.weights.block_weights import reader
from toolchain.weights.digests import checkpoint_digest

Tables = Mapping[str, torch.Tensor]


def component_tables(plan: ComponentPlan) -> dict[str, torch.Tensor]:
    """All tables of a component, float32, by name.

    Raises:
        CheckpointError: a tensor that a table is made of has numbers that are NaN or infinite.
        LoweringError: a table has such numbers though its tensors have none.
    """
    tables: dict[str, torch.Tensor] = {}
    for graph in plan.graphs:
        tables |= _Evaluation(graph, plan).tables()
    return tables


class _Evaluation(fx.Interpreter):
    """Computes what a graph's tables need, and nothing else; reads each tensor when it is used."""

    def __init__(self, graph: Graph, plan: ComponentPlan) -> None:
        super().__init__(graph.functions["base"], garbage_collect_values=False)
        self._graph, self._component = graph, plan.name
        self._read_tensor = reader(plan.resolved.checkpoint, plan.definition.aliases)
        self._values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def tables(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, node in table_nodes(self._graph).items():
            value = self._value(node).float().contiguous()
            if not bool(torch.isfinite(value).all()):
                raise LoweringError(f"{self._component}: table '{name}' has numbers that are NaN or infinite")
            found[name] = value
        return found

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._weight(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        if node.op == "call_module":
            prefix = f"{node.target}."
            names = self._graph.weights_at(str(node.target))
            state = {name.removeprefix(prefix): self._weight(name) for name in names}
            module = self.module.get_submodule(str(node.target))
            return torch.func.functional_call(module, state, tuple(args), dict(kwargs))
        return getattr(self, node.op)(node.target, args, kwargs)

    def _weight(self, name: str) -> torch.Tensor:
        return self._graph.weights[name].source.value(self._finite).float()

    def _finite(self, tensor: str) -> torch.Tensor:
        value = self._read_tensor(tensor)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{self._component}: tensor '{tensor}' has numbers that are NaN or infinite; mend the checkpoint"
            )
        return value


def tables_origin(planned: Plan, plan: ComponentPlan, digests: Mapping[str, str]) -> dict[str, Any]:
    """What decides a component's tables, besides code: as plain data, for keys, and without computing them."""
    return {
        "config": key_of({"config": json.loads(json.dumps(plan.definition.config))}),
        "dims": [dict(graph.dims) for graph in plan.graphs],
        "video": planned.recipe.video.model_dump(mode="json"),
        "checkpoint": checkpoint_digest(digests),
    }


def table_digests(tables: Tables) -> dict[str, str]:
    """sha256 of each table's shape and numbers: what was executed with other tables is not this one's."""
    return {
        name: hashlib.sha256(f"{list(value.shape)}\n".encode() + value.contiguous().numpy().tobytes()).hexdigest()
        for name, value in sorted(tables.items())
    }


def write_tables(tables: Tables, path: Path, folder: Path) -> File | None:
    """Write a component's tables file, if it has tables."""
    if not tables:
        return None
    save_file(dict(tables), path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    return describe_file(path, folder)
