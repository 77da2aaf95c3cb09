"""A graph as text: what ``--print-after`` shows, what goldens hold and what cache keys are made of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from toolchain.ir.dtypes import dtype_of
from toolchain.ir.graph import Graph, describe_target, output_node
from toolchain.ir.leaves import plain_attributes


def graph_text(graph: Graph) -> str:
    """The whole graph: its sizes, then every function, with units and blocks as comments between nodes."""
    sizes = " ".join(f"{k}={v}" for k, v in graph.dims.items())
    parts = [f"graph {graph.component} {sizes}"]
    parts += [function_text(gm, name, graph.outputs) for name, gm in graph.functions.items()]
    return "\n\n".join(parts) + "\n"


def function_text(gm: fx.GraphModule, name: str, outputs: Iterable[str] = ()) -> str:
    """One function: a line a node, ``%name : dtype[shape] = target(arguments)``."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    lines = [f"{name}({', '.join(f'%{n.name} : {value_text(n)}' for n in inputs)}):"]
    place = ""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        here = node.meta.get("block") or ".".join(node.meta.get("unit", ()))
        if here and here != place:
            lines.append(f"  # {here}")
            place = here
        lines.append(f"  {_node_text(node)}")
    results = output_node(gm).args[0]
    shown = ", ".join(_argument_text(a) for a in (results if isinstance(results, tuple) else (results,)))
    names = ", ".join(outputs)
    lines.append(f"  return {shown}" + (f"  # {names}" if names else ""))
    return "\n".join(lines)


def value_text(node: fx.Node) -> str:
    """Dtype and shape of a node's value, ``f32[2, 300]``."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{dtype_of(value.dtype).short}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({len(value)} values)"
    return "?"


def _node_text(node: fx.Node) -> str:
    target = describe_target(node)
    if node.op == "get_attr":
        return f"%{node.name} : {value_text(node)} = weight {target}"
    arguments = [_argument_text(a) for a in node.args] + [f"{k}={_argument_text(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name} : {value_text(node)} = {target}({', '.join(arguments)})"


def _argument_text(argument: object) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (tuple, list)):
        return f"({', '.join(_argument_text(a) for a in argument)})"
    return f"{argument:.9g}" if isinstance(argument, float) else str(argument)


def leaves_text(gm: fx.GraphModule) -> str:
    """Every called module with its class, its plain attributes and the shapes of its weights.

    With :func:`function_text` it holds everything that decides what a function computes, save the weights.
    """
    seen: dict[str, nn.Module] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            seen.setdefault(str(node.target), gm.get_submodule(str(node.target)))
    lines = []
    for path, module in seen.items():
        for name, part in module.named_modules(prefix=path):
            weights = {
                k: list(v.shape) for k, v in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
            }
            lines.append(f"{name}: {type(part).__name__} {plain_attributes(part)} {weights}")
    return "\n".join(lines)


def definition_text(graph: Graph) -> str:
    """All that a graph says, as text: its functions, leaves, and where its weights come from and how they are kept."""
    parts = [graph_text(graph), *(leaves_text(gm) for gm in graph.functions.values())]
    parts += [f"{name} = {weight}" for name, weight in graph.weights.items()]
    return "\n".join(parts)
