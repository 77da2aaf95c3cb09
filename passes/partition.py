"""Cut a component into blocks: what is lowered, loaded and freed as one.

A model names its units: layers (``pair.3``, with ``spatial`` and ``temporal`` in it) and others (``embed``,
``final``). Layers in a row are packed together, by count or by bytes of weights; every other unit is a
block of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby, islice

from pydantic import Field, model_validator
from torch import fx

from toolchain.errors import LoweringError
from toolchain.ir.graph import Graph, compute_nodes
from toolchain.ir.memory_cut import Unit, by_memory, names_of, stem_of
from toolchain.ir.passes import Pass, PassConfig
from toolchain.ir.target import Target
from toolchain.validation import Bytes


class PartitionConfig(PassConfig):
    """One of the four; without any, one layer (for STDiT3: one spatial + temporal pair) is a block."""

    layers_per_block: int | None = Field(default=None, ge=1, description="Layers (pairs) in a block.")
    blocks: int | None = Field(default=None, ge=1, description="Number of blocks that the layers are divided into.")
    max_bytes: Bytes | None = Field(default=None, description="Most bytes of weights in a block, as '200MB'.")
    max_memory: Bytes | None = Field(
        default=None, description="Most bytes of weights and activations that a block needs while it runs, as '600MB'."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> PartitionConfig:
        given = [n for n in ("layers_per_block", "blocks", "max_bytes", "max_memory") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}, not {len(given)}")
        return self


class Partition(Pass):
    """Give every node its block (``meta["block"]``), in all functions alike."""

    name = "partition"
    phase = "partition"
    Config = PartitionConfig
    config: PartitionConfig

    _chosen: Mapping[Unit, str] | None = None

    def chosen_for(self, graph: Graph, target: Target) -> Pass:
        if self.config.max_memory is None:
            return self
        chosen = Partition(self.config)
        chosen._chosen = by_memory(graph, target, self.config.max_memory)
        return chosen

    def requires(self, graph: Graph) -> None:
        if graph.blocks():
            raise LoweringError("the graph is partitioned already; list the pass once")

    def call(self, graph: Graph) -> Graph:
        graph = graph.copy()
        base = graph.functions["base"]
        units = list(dict.fromkeys(n.meta["unit"] for n in compute_nodes(base) if n.meta["rate"] != "build"))
        names: dict[Unit, str] = dict(self._chosen or {})
        if self.config.max_memory is not None and self._chosen is None:
            raise LoweringError("max_memory: what blocks need depends on the target; choose the cuts for one first")
        bytes_of = _weight_bytes(graph, base)
        for stem, run in groupby([u for u in units if u not in names], key=stem_of):
            if stem is None:
                names |= {u: ".".join(u) for u in run}
            else:
                names |= self._pack(stem, list(run), bytes_of)
        for gm in graph.functions.values():
            for node in compute_nodes(gm):
                node.meta["block"] = "tables" if node.meta["rate"] == "build" else names[node.meta["unit"]]
        return graph

    def ensures(self, graph: Graph) -> None:
        order = {name: i for i, name in enumerate(graph.blocks())}
        for function, gm in graph.functions.items():
            for node in compute_nodes(gm):
                for i in node.all_input_nodes:
                    if order.get(i.meta.get("block", ""), -1) > order.get(node.meta["block"], len(order)):
                        raise LoweringError(f"'{function}': '{node.name}' needs '{i.name}' from a later block")

    def _pack(self, stem: str, units: list[Unit], bytes_of: dict[Unit, int]) -> dict[Unit, str]:
        layers = [list(parts) for _, parts in groupby(units, key=lambda u: u[0])]
        if self.config.max_bytes is not None:
            bins = _by_bytes(layers, self.config.max_bytes, bytes_of)
        else:
            per_block = self.config.layers_per_block or 1
            counts = [per_block] * (-(-len(layers) // per_block))
            if self.config.blocks is not None:
                if self.config.blocks > len(layers):
                    raise LoweringError(
                        f"blocks: {self.config.blocks} is more than the {len(layers)} layers of '{stem}'"
                    )
                least, more = divmod(len(layers), self.config.blocks)
                counts = [least + 1] * more + [least] * (self.config.blocks - more)
            rest = iter(layers)
            bins = [[u for parts in islice(rest, n) for u in parts] for n in counts]
        return names_of(stem, layers, bins)


def _by_bytes(layers: list[list[Unit]], most: int, bytes_of: dict[Unit, int]) -> list[list[Unit]]:
    """Pack in order, greedily; a layer that is too large is cut into its parts."""
    bins: list[list[Unit]] = []
    room = 0

    def put(units: list[Unit], size: int) -> None:
        nonlocal room
        if size > room:
            bins.append([])
            room = most
        bins[-1].extend(units)
        room -= size

    for parts in layers:
        size = sum(bytes_of[u] for u in parts)
        if size <= most:
            put(parts, size)
            continue
        room = 0  # parts of one layer share a block with no other layer
        for part in parts:
            if bytes_of[part] > most:
                where, needed = ".".join(part), bytes_of[part]
                raise LoweringError(f"max_bytes: '{where}' alone has {needed} bytes of weights, more than {most}")
            put([part], bytes_of[part])
        room = 0
    return bins


def _weight_bytes(graph: Graph, gm: fx.GraphModule) -> dict[Unit, int]:
    """Bytes of the weights that each unit's nodes use, as they will be kept."""
    used: dict[Unit, set[str]] = {}
    for node in compute_nodes(gm):
        paths = [str(i.target) for i in node.all_input_nodes if i.op == "get_attr"]
        if node.op == "call_module":
            paths.append(str(node.target))
        used.setdefault(node.meta["unit"], set()).update(name for path in paths for name in graph.weights_at(path))
    return {unit: sum(graph.weights[n].bytes for n in names) for unit, names in used.items()}
