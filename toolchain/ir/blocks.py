"""Blocks: what a partitioned graph is lowered, loaded and freed as.

Blocks of equal structure come out equal: module paths are renumbered within a block, and values that
cross borders are named by the model (``wire``), so pair 3 and pair 17 differ only in their weights.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from toolchain.errors import LoweringError
from toolchain.ir.activations import rounded_layers, unrounded, without_scales
from toolchain.ir.graph import (
    RATES,
    Graph,
    Rate,
    compute_nodes,
    describe_target,
    leaf_of,
    output_values,
)
from toolchain.ir.graph_text import function_text, leaves_text
from toolchain.ir.weights import Weight, quantized

TABLES = "tables"
INPUTS = "inputs"


@dataclass(frozen=True)
class Port:
    """A block's input or output. ``exact`` ones stay float32 whatever the artifact's precision.

    ``scale`` is what the values that pass here are multiplied with, against the model's own: a legal form
    may keep a stream small.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    exact: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Signature:
    """The ports of one function, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def names(self) -> tuple[list[str], list[str]]:
        return [p.name for p in self.inputs], [p.name for p in self.outputs]


@dataclass(frozen=True)
class Block:
    """One block: functions over the same weights and the same ports, whose shapes may differ by function.

    ``sources`` says where each input comes from: ``inputs.NAME`` (of the component), ``tables.NAME``, or
    ``BLOCK.PORT``. ``weights`` maps the block's own parameter names to tensors of the checkpoint.
    """

    component: str
    name: str
    rate: Rate
    functions: Mapping[str, fx.GraphModule]
    signatures: Mapping[str, Signature]
    sources: Mapping[str, str]
    weights: Mapping[str, Weight]
    results: Mapping[str, str] = field(default_factory=dict)
    """Outputs that are the graph's own, by port."""

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Inputs of ``base``."""
        return self.signatures["base"].inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Outputs of ``base``."""
        return self.signatures["base"].outputs

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(w.parameters for w in self.weights.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the artifact keeps them."""
        return sum(w.bytes for w in self.weights.values())

    @property
    def quantized(self) -> dict[str, str]:
        """Names of the storages of weights that are no plain numbers, by weight."""
        return {n: w.storage.name for n, w in quantized(self.weights).items()}

    @property
    def int8_inputs(self) -> tuple[str, ...]:
        """Names of the weights whose linear layers round what comes in, with fixed scales."""
        found = {name for gm in self.functions.values() for name in rounded_layers(gm)}
        return tuple(name for name in self.weights if name in found)

    def unrounded(self) -> Block:
        """The block as the model has it, whose linear layers round nothing."""
        if not self.int8_inputs:
            return self
        functions = {name: unrounded(gm) for name, gm in self.functions.items()}
        return dataclasses.replace(self, functions=functions, weights=without_scales(self.weights))

    def own_function(self, function: str) -> str:
        """The function that runs when ``function`` is asked for: ``base``, where the block does not have it."""
        return function if function in self.functions else "base"

    def structure(self) -> str:
        """A digest that blocks share when they differ in nothing but their weights."""
        parts = []
        for name, gm in self.functions.items():
            parts += [name, str(self.signatures[name]), function_text(gm, name), leaves_text(gm)]
        parts += [f"{name}: {weight.storage.name}" for name, weight in self.weights.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def module(self, function: str, weights: Mapping[str, torch.Tensor]) -> fx.GraphModule:
        """A function with real weights, ready to run or export; takes and returns tensors by port order."""
        return materialise(self.functions[function], weights)


@dataclass(frozen=True)
class BlockPair:
    """A block as its target lowers it, in legal forms, and as the model has it, which it is held against."""

    lowered: Block
    plain: Block

    @property
    def name(self) -> str:
        return self.lowered.name


def materialise(gm: fx.GraphModule, weights: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """``gm`` with real weights, by parameter name; its own modules are shared and stay as they are."""
    return fx.GraphModule(_skeleton(gm, weights), copied(gm.graph), class_name=type(gm).__name__).eval()


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy, for another module: a graph holds on to its module, and so to that one's weights."""
    copy_ = fx.Graph()
    copy_.output(copy_.graph_copy(graph, val_map={}))
    return copy_


def _skeleton(gm: fx.GraphModule, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    memo: dict[int, object] = {}
    for name, p in (*gm.named_parameters(), *gm.named_buffers()):
        value = weights[name]
        memo[id(p)] = nn.Parameter(value, requires_grad=False) if isinstance(p, nn.Parameter) else value
    root = nn.Module()
    for node in gm.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _set_path(root, str(node.target), copy.deepcopy(_get_path(gm, str(node.target)), memo))
    return root


def _get_path(root: nn.Module, path: str) -> object:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _set_path(root: nn.Module, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(last, value)
    else:
        setattr(root, last, value)


def extract_blocks(graph: Graph) -> tuple[Block, ...]:
    """The blocks of a partitioned graph, in the order in which they run.

    Raises:
        LoweringError: the graph is not partitioned, or a block's functions differ in their ports.
    """
    names = graph.blocks()
    if not names:
        raise LoweringError(f"{graph.component}: not partitioned; put 'partition' last in its passes")
    cuts = {f: _Cut(graph, gm) for f, gm in graph.functions.items()}
    return tuple(_extract(graph, cuts, name) for name in names)


def table_nodes(graph: Graph) -> dict[str, fx.Node]:
    """Values known when the bundle is built and used by blocks or returned: name → node of ``base``."""
    cut = _Cut(graph, graph.functions["base"])
    found = {}
    for node in graph.functions["base"].graph.nodes:
        if cut.place(node) == TABLES and (node in cut.returned or any(cut.is_outside_use(node, u) for u in node.users)):
            found[cut.wire_name(node)] = node
    return found


def value_of(graph: Graph, function: str, source: str) -> fx.Node:
    """The node of a partitioned graph's function that gives what is called ``BLOCK.OUTPUT`` between blocks."""
    block, _, port = source.partition(".")
    names = _Cut(graph, graph.functions[function]).output_names(block)
    return next(node for node, name in names.items() if name == port)


class _Cut:
    """One function's nodes sorted into blocks."""

    def __init__(self, graph: Graph, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.returned = dict(zip(output_values(gm), graph.outputs, strict=True))
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.scale = scales(gm)
        self._nodes: dict[str, list[fx.Node]] = {}
        for node in compute_nodes(gm):
            self._nodes.setdefault(str(node.meta["block"]), []).append(node)

    def place(self, node: fx.Node) -> str:
        """The block a node runs in, ``tables`` or ``inputs``; empty for weights and the output."""
        if node.op == "placeholder":
            return INPUTS
        if node.op == "output":
            return ""
        if node.op == "get_attr":
            return TABLES if node in self.returned else ""
        return str(node.meta["block"])

    def is_outside_use(self, node: fx.Node, user: fx.Node) -> bool:
        return user.op != "output" and self.place(user) != self.place(node)

    def wire_name(self, node: fx.Node) -> str:
        return str(
            node.meta.get("wire") or self.returned.get(node) or (node.target if node.op == "placeholder" else node.name)
        )

    def nodes(self, block: str) -> list[fx.Node]:
        """A block's nodes, in order."""
        return self._nodes.get(block, [])

    def inputs(self, nodes: list[fx.Node]) -> list[fx.Node]:
        inside = set(nodes)
        used = {i for n in nodes for i in n.all_input_nodes if i not in inside and self.place(i)}
        return sorted(used, key=self.order.__getitem__)

    def outputs(self, nodes: list[fx.Node]) -> list[fx.Node]:
        return [n for n in nodes if n in self.returned or any(self.is_outside_use(n, u) for u in n.users)]

    def source(self, node: fx.Node) -> str:
        place = self.place(node)
        if place in (INPUTS, TABLES):
            return f"{place}.{self.wire_name(node)}"
        return f"{place}.{self.output_names(place)[node]}"

    def output_names(self, block: str) -> dict[fx.Node, str]:
        """Port names of a block's outputs; one that an input has too gets ``_out``."""
        nodes = self.nodes(block)
        taken = set(_unique(self.wire_name(n) for n in self.inputs(nodes)))
        outputs = self.outputs(nodes)
        names = _unique(self.wire_name(n) for n in outputs)
        return {n: f"{name}_out" if name in taken else name for n, name in zip(outputs, names, strict=True)}


def scales(gm: fx.GraphModule) -> dict[fx.Node, float]:
    """Each value's :attr:`Port.scale`: a leaf declares its output's, all else hands on its input's."""
    scales: dict[fx.Node, float] = {}
    for node in gm.graph.nodes:
        leaf = leaf_of(gm, node)
        if leaf is not None:
            scales[node] = leaf.output_scale
        else:
            scales[node] = scales[node.all_input_nodes[0]] if node.all_input_nodes else 1.0
    return scales


def _port(name: str, node: fx.Node, scale: float, exact: bool = False) -> Port:
    value = node.meta["val"]
    return Port(name, tuple(value.shape), value.dtype, exact, scale)


def _unique(names: Iterator[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        candidate, i = name, 1
        while candidate in result:
            i += 1
            candidate = f"{name}_{i}"
        result.append(candidate)
    return result


def _extract(graph: Graph, cuts: Mapping[str, _Cut], name: str) -> Block:
    functions: dict[str, fx.GraphModule] = {}
    signatures: dict[str, Signature] = {}
    sources: dict[str, dict[str, str]] = {}
    rate: Rate = "build"
    results: dict[str, str] = {}
    weights: dict[str, Weight] = {}
    local = _local_paths(t for cut in cuts.values() for n in cut.nodes(name) for t in _targets(n))
    for function, cut in cuts.items():
        nodes = cut.nodes(name)
        ins = cut.inputs(nodes)
        in_names = _unique(cut.wire_name(n) for n in ins)
        exact = {i.name for i in graph.inputs if i.exact}
        inputs = tuple(
            _port(port, n, cut.scale[n], n.op == "placeholder" and str(n.target) in exact)
            for n, port in zip(ins, in_names, strict=True)
        )
        out_names = cut.output_names(name)
        outputs = tuple(_port(port, n, cut.scale[n]) for n, port in out_names.items())
        signatures[function] = Signature(inputs, outputs)
        results |= {port: cut.returned[n] for n, port in out_names.items() if n in cut.returned}
        sources[function] = {p: cut.source(n) for n, p in zip(ins, in_names, strict=True)}
        functions[function] = _submodule(cut.gm, nodes, dict(zip(ins, in_names, strict=True)), list(out_names), local)
        rate = max((rate, *(n.meta["rate"] for n in nodes)), key=RATES.index)
        for path, inner in local.items():
            for full in graph.weights_at(path):
                weights[inner + full.removeprefix(path)] = graph.weights[full]
    for function, signature in signatures.items():
        if signature.names() != signatures["base"].names() or sources[function] != sources["base"]:
            raise LoweringError(
                f"{graph.component}: block '{name}': '{function}' has other inputs or outputs than 'base'"
            )
    used = {k for gm in functions.values() for k, _ in (*gm.named_parameters(), *gm.named_buffers())}
    kept = {k: v for k, v in sorted(weights.items()) if k in used}
    return Block(graph.component, name, rate, functions, signatures, sources["base"], kept, results)


def _targets(node: fx.Node) -> Iterator[str]:
    """The modules and weights that a node uses, by path."""
    if node.op == "call_module":
        yield str(node.target)
    for i in node.all_input_nodes:
        if i.op == "get_attr":
            yield str(i.target)


def _local_paths(paths: Iterator[str]) -> dict[str, str]:
    """Renumber the numeric parts of module paths from 0 within a block, in order of first use."""
    numbers: dict[str, dict[str, str]] = {}
    local: dict[str, str] = {}
    for path in paths:
        parts: list[str] = []
        for part in path.split("."):
            if part.isdigit():
                seen = numbers.setdefault(".".join(parts), {})
                part = seen.setdefault(part, str(len(seen)))
            parts.append(part)
        local.setdefault(path, ".".join(parts))
    return local


def _submodule(
    gm: fx.GraphModule,
    nodes: list[fx.Node],
    inputs: Mapping[fx.Node, str],
    outputs: list[fx.Node],
    local: Mapping[str, str],
) -> fx.GraphModule:
    """A graph module of ``nodes``, with ``inputs`` as placeholders and modules at their local paths."""
    new = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    modules: dict[str, object] = {}
    for node, port in inputs.items():
        copied[node] = new.placeholder(port)
        copied[node].meta["val"] = node.meta["val"]
    for node in nodes:
        for i in node.all_input_nodes:
            if i not in copied:  # a weight: everything else is a port or an earlier node
                copied[i] = new.get_attr(local[str(i.target)])
                copied[i].meta["val"] = i.meta["val"]
                modules[local[str(i.target)]] = _get_path(gm, str(i.target))
        twin = new.node_copy(node, copied.__getitem__)
        twin.meta = {"val": node.meta["val"]}
        if node.op == "call_module":
            twin.target = local[str(node.target)]
            modules[twin.target] = gm.get_submodule(str(node.target))
        copied[node] = twin
    new.output(tuple(copied[n] for n in outputs))
    _rename(new)
    return fx.GraphModule(modules, new, class_name="Block")


def _rename(graph: fx.Graph) -> None:
    """Name nodes by what they call, so that equal blocks have equal text."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            stem = describe_target(node).replace(".", "_")
            counts[stem] = counts.get(stem, -1) + 1
            node.name = f"{stem}_{counts[stem]}"
