"""The graph that passes rewrite and targets lower.

A component is captured with ``torch.fx`` at the level of its *leaves*: modules that mean something to
a reader (Attention, Mlp, …) and that are looked into only when a block is lowered. Weights are never
allocated: parameters live on the ``meta`` device, and a :class:`~toolchain.ir.weights.Weight` says which tensors of
the checkpoint each of them stands for and how artifacts keep it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import torch
from torch import fx, nn

from toolchain.errors import LoweringError
from toolchain.ir.feeds import Feed, Given
from toolchain.ir.leaves import Leaf, plain_attributes
from toolchain.ir.storage import Storage
from toolchain.ir.weights import Weight, WeightSource

F = TypeVar("F", bound=Callable[..., Any])

Rate = Literal["build", "prompt", "step", "chunk", "frames", "encode_frames", "encode_chunk"]
"""How often a value changes: never (known when the bundle is built), per prompt, per denoising step; in the
VAE per micro chunk of latents and per group of frames, decoding and encoding."""

RATES: tuple[Rate, ...] = get_args(Rate)


def leaf_function(fn: F) -> F:
    """Make a function on tensors one node of the graph, wherever it is imported to.

    (``fx.wrap`` only knows calls from the module that defines the function.)
    """

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies = [a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)]
        if proxies:
            return proxies[0].tracer.create_proxy("call_function", call, args, kwargs)
        return fn(*args, **kwargs)

    return cast(F, call)


@leaf_function
def wire(value: torch.Tensor, name: str) -> torch.Tensor:
    """Name a value that may cross a block's border; the identity otherwise.

    Names are a block's interface, so equal blocks must use equal names: the residual stream is ``x``
    after every layer. Capture records the name and removes the call.
    """
    return value


@dataclass(frozen=True)
class Input:
    """An input of a component: ``shape`` and ``dtype``, what feeds it, and how often it changes.

    ``exact`` inputs stay float32 whatever the precision of the artifact: a timestep of 977 is not a
    float16 number.
    """

    name: str
    shape: tuple[int, ...]
    feed: Feed
    rate: Rate = "step"
    dtype: torch.dtype = torch.float32
    exact: bool = False


@dataclass(frozen=True)
class Graph:
    """One component: its functions, which share modules and therefore weights."""

    component: str
    functions: Mapping[str, fx.GraphModule]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    gives: Mapping[str, Given]
    """What each output is; those that are only values known at build time are not in it."""
    dims: Mapping[str, int]
    """Sizes that the graph was captured for: ``B`` batch, ``T`` frames, ``S`` tokens a frame, …"""
    weights: Mapping[str, Weight] = field(default_factory=dict)

    def copy(self) -> Graph:
        """The same graph with nodes of its own and shared modules, so that a pass may edit it."""
        return dataclasses.replace(self, functions={k: copy_module(v) for k, v in self.functions.items()})

    def stored_as(self, storage: Storage) -> Graph:
        """The same graph with every weight kept in ``storage``; passes may change single ones after that."""
        kept = {name: dataclasses.replace(weight, storage=storage) for name, weight in self.weights.items()}
        return dataclasses.replace(self, weights=kept)

    def weights_at(self, path: str) -> tuple[str, ...]:
        """Names of the weights of the module at ``path``, or of the weight that stands there."""
        return tuple(self._weights_at.get(path, ()))

    @functools.cached_property
    def _weights_at(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.weights:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                found.setdefault(".".join(parts[:depth]), []).append(name)
        return found

    def inputs_of(self, function: str) -> tuple[Input, ...]:
        """Inputs with the shapes that a function takes (``base``'s, for one that the graph does not have)."""
        gm = self.functions.get(function, self.functions["base"])
        shapes = {str(n.target): tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.op == "placeholder"}
        return tuple(dataclasses.replace(i, shape=shapes[i.name]) for i in self.inputs)

    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks in the order in which they run; empty before ``partition``."""
        nodes = compute_nodes(self.functions["base"])
        return tuple(dict.fromkeys(n.meta["block"] for n in nodes if "block" in n.meta and n.meta["rate"] != "build"))


def with_function(graph: Graph, name: str, other: Graph) -> Graph:
    """``graph`` with ``other``'s ``base`` as the function ``name``: the same modules at other sizes."""
    if other.outputs != graph.outputs or [i.name for i in other.inputs] != [i.name for i in graph.inputs]:
        raise LoweringError(f"{graph.component}: '{name}' has other inputs or outputs than 'base'")
    return dataclasses.replace(graph, functions={**graph.functions, name: other.functions["base"]})


class LoweredForm(nn.Module):
    """A model as it is lowered: fixed shapes, no data-dependent control flow, outputs named by ``wire``.

    Its children are the model's own, under the official names, so parameters keep their official keys.
    """

    component: ClassVar[str]
    entry: str = "forward"
    """The method that is traced; its arguments are the inputs, in order."""

    def inputs(self) -> tuple[Input, ...]:
        raise NotImplementedError

    def gives(self) -> dict[str, Given]:
        """What each output is, by name."""
        raise NotImplementedError

    def dims(self) -> dict[str, int]:
        raise NotImplementedError

    def source(self, parameter: str, shape: tuple[int, ...]) -> WeightSource:
        """Where a parameter's numbers come from: the tensor of the same name, unless a model says otherwise."""
        return WeightSource((parameter,), shape)

    def unit(self, path: str) -> tuple[str, ...]:
        """The partition unit of the module at ``path``, coarse to fine: ``("pair.3", "spatial")``."""
        raise NotImplementedError


_one_at_a_time = threading.Lock()
"""While it traces, torch.fx replaces how modules are called, in all threads; two tracers would undo one another."""


class _LeafTracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # another thread's module, which is being run
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Leaf) or super().is_leaf_module(m, module_qualified_name)


def capture(form: LoweredForm) -> Graph:
    """Capture ``form`` as a :class:`Graph` with the one function ``base``.

    Every node's ``meta`` gets ``val`` (a meta tensor: shape and dtype), ``rate`` (:data:`Rate`) and
    ``unit`` (what partition may cut between). Nothing is computed and no weight is allocated when the
    model was built under ``torch.device("meta")``.
    """
    if any(not p.is_meta for p in form.parameters()):
        raise LoweringError(f"{form.component}: build the model under torch.device('meta') to capture it")
    tracer = _LeafTracer()
    tracer.traced_func_name = form.entry
    with _one_at_a_time:
        graph = tracer.trace(form)
    gm = fx.GraphModule(form, graph, class_name=type(form).__name__)
    inputs = form.inputs()
    output = output_node(gm)
    results = output.args[0] if isinstance(output.args[0], tuple) else (output.args[0],)
    named = [n for n in cast(tuple[fx.Node, ...], results) if n.target is wire]
    if len(named) != len(results):
        raise LoweringError(f"{form.component}: every output of a lowered form needs a name; wrap it in wire()")
    outputs = tuple(str(n.args[1]) for n in named)
    output.args = (results,)
    _fold_wires(gm)
    propagate_shapes(gm, inputs)
    _propagate_rates(gm, inputs)
    _propagate_units(gm, form)
    shapes = {name: tuple(p.shape) for name, p in (*gm.named_parameters(), *gm.named_buffers())}
    weights = {name: Weight(form.source(name, shape)) for name, shape in shapes.items()}
    return Graph(form.component, {"base": gm}, inputs, outputs, form.gives(), form.dims(), weights)


def _fold_wires(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.target is wire:
            value, name = node.args
            value.meta["wire"] = name
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
    gm.recompile()


def propagate_shapes(gm: fx.GraphModule, inputs: tuple[Input, ...]) -> None:
    """Fill ``meta["val"]`` of every node that lacks it, by running those nodes on meta tensors."""

    known: dict[object, object] = {}  # equal leaves on equal shapes, as in the layers of a transformer

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            if "val" in n.meta:
                return n.meta["val"]
            key = _computation_key(gm, n)
            if key in known:
                n.meta["val"] = known[key]
                return n.meta["val"]
            try:
                n.meta["val"] = super().run_node(n)
                if key is not None:
                    known[key] = n.meta["val"]
            except LoweringError:
                raise
            except Exception as e:
                raise LoweringError(f"shapes do not fit at '{n.name}' ({describe_target(n)}): {_first_line(e)}") from e
            return n.meta["val"]

    args = [torch.empty(i.shape, dtype=i.dtype, device="meta") for i in inputs]
    with torch.device("meta"):
        recorder = Recorder(gm)
        recorder.extra_traceback = False  # our own error says where
        recorder.run(*args)


def _computation_key(gm: fx.GraphModule, node: fx.Node) -> object:
    """What decides the shape of a called module's result; None for other nodes."""
    if node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    parts = tuple((type(m), str(plain_attributes(m))) for m in module.modules())
    weights = tuple(tuple(p.shape) for p in module.parameters())
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: (tuple(n.meta["val"].shape), n.meta["val"].dtype))
    return parts, weights, str(arguments)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _propagate_rates(gm: fx.GraphModule, inputs: tuple[Input, ...]) -> None:
    by_name = {i.name: i.rate for i in inputs}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            rate = by_name[str(node.target)]
        else:
            rate = max((n.meta["rate"] for n in node.all_input_nodes), key=RATES.index, default="build")
        node.meta["rate"] = rate


def _propagate_units(gm: fx.GraphModule, form: LoweredForm) -> None:
    order: dict[tuple[str, ...], int] = {}
    for node in compute_nodes(gm):
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(stack.values()))[0] if stack else ""
        if path:
            node.meta["unit"] = form.unit(path)
        else:  # arithmetic between leaves belongs with the latest of what it combines
            units = [n.meta["unit"] for n in node.all_input_nodes if "unit" in n.meta]
            if not units:
                continue
            node.meta["unit"] = max(units, key=lambda u: order[u])
        order.setdefault(node.meta["unit"], len(order))
    for node in reversed(list(compute_nodes(gm))):  # arithmetic on inputs alone: with its first user
        if "unit" not in node.meta:
            node.meta["unit"] = next(u.meta["unit"] for u in node.users)


def compute_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that compute something: neither inputs, outputs, nor reads of a parameter."""
    return (n for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr"))


def output_node(gm: fx.GraphModule) -> fx.Node:
    return cast(fx.Node, next(n for n in reversed(gm.graph.nodes) if n.op == "output"))


def output_values(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The nodes that a function returns, in order."""
    return cast(tuple[fx.Node, ...], output_node(gm).args[0])


def leaf_of(gm: fx.GraphModule, node: fx.Node) -> Leaf | None:
    """The leaf that a node calls, or None."""
    if node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    return module if isinstance(module, Leaf) else None


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module with nodes of its own (``meta`` copied) that calls the same modules."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
        copied[node].name = node.name
        copied[node].meta = dict(node.meta)
    return fx.GraphModule(gm, graph, class_name=type(gm).__name__)


def describe_target(node: fx.Node) -> str:
    """A node's target as a reader would name it: a module's path, or an operator."""
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))
