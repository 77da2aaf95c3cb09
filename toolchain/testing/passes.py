"""Holding a pass to its protocol, on whatever graphs its author names.

from toolchain.testing.passes import check_pass
from toolchain.testing.samples import sample_graph

def test_my_pass():
    check_pass(MyPass(), [sample_graph()], keeps_base=True, refuses=[sample_graph(layers=0)])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from toolchain.errors import LoweringError
from toolchain.ir.activations import without_scales
from toolchain.ir.blocks import extract_blocks, materialise, table_nodes
from toolchain.ir.dtypes import dtype_of
from toolchain.ir.graph import Graph, compute_nodes, copy_module, output_values, propagate_shapes
from toolchain.ir.graph_text import definition_text, value_text
from toolchain.ir.passes import Pass
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.models.samples import sample_input
from toolchain.testing.report import Report, require, require_refusal
from toolchain.testing.samples import Checkpoint

__all__ = ["check_pass"]

SAME = 1e-5
"""Relative error that another order of the same float32 operations may have."""


def check_pass(
    made: Pass, graphs: Sequence[Graph], *, keeps_base: bool = False, refuses: Sequence[Graph] = ()
) -> Report:
    """Hold ``made`` to what a pass promises, on each of ``graphs``.

    Args:
        graphs: that the pass takes; none may be partitioned.
        keeps_base: the pass says that ``base`` computes the same numbers after it.
        refuses: graphs that the pass says it cannot take.

    Raises:
        AssertionError: names the pass, what is broken and where.
    """
    report = Report(f"pass '{made.name}'")
    with report.part("options as text and JSON"):
        _check_options(made)
    for graph in graphs:
        _check_on(made, graph, report, keeps_base)
    if not keeps_base:
        report.skip("base computes the same", "not claimed (keeps_base)")
    for graph in refuses:
        with report.part("refuses what it cannot take"):
            _check_refusal(made, graph)
    if not refuses:
        report.skip("refuses what it cannot take", "no such graph was given (refuses)")
    return report


def _check_options(made: Pass) -> None:
    read = type(made).Config.read
    ((name, options),) = parse_pipeline(str(made))
    require(name == made.name, f"its text '{made}' names '{name}'")
    require(read(options) == made.config, f"its text '{made}' reads as {read(options)!r}, not as {made.config!r}")
    require(str(type(made)(read(options))) == str(made), f"its text '{made}' is another after being read")
    for defaults in (False, True):
        written = json.loads(json.dumps(made.config.written(defaults=defaults)))
        require(read(written) == made.config, f"its JSON {written} (defaults={defaults}) reads as {read(written)!r}")


def _check_on(made: Pass, graph: Graph, report: Report, keeps_base: bool) -> None:
    with report.part("pure and deterministic"):
        result = _check_pure(made, graph)
    with report.part("nodes and shapes"):
        _check_nodes(result)
    with report.part("weights"):
        _check_weights(graph, result)
    with report.part("inputs, outputs and functions"):
        _check_interface(made, graph, result)
    if keeps_base:
        with report.part("base computes the same"):
            _check_base(graph, result)
    if made.phase == "partition":
        with report.part("blocks in a row are the graph"):
            _check_blocks(result)


def _everything(graph: Graph) -> str:
    """All that a pass may read or write, as text."""
    known = ("wire", "rate", "unit", "block")
    notes = [[[n.meta.get(k) for k in known] for n in gm.graph.nodes] for gm in graph.functions.values()]
    return f"{definition_text(graph)}\n{graph.inputs}\n{graph.gives}\n{notes}"


def _check_pure(made: Pass, graph: Graph) -> Graph:
    before = _everything(graph)
    first = made(graph)
    once = _everything(first)
    require(_everything(graph) == before, "it changed its argument; work on graph.copy()")
    again = _everything(made(graph))
    require(again == once, f"a second run on the same graph gives another result{_difference(once, again)}")
    other = _everything(type(made)(made.config)(graph))
    require(other == once, f"another object of the same options gives another result{_difference(once, other)}")
    require(_everything(first) == once, "a later run changed an earlier one's result")
    return first


def _difference(one: str, other: str) -> str:
    pairs = zip(one.splitlines(), other.splitlines(), strict=False)
    return next((f": '{a.strip()}' and '{b.strip()}'" for a, b in pairs if a != b), "")[:300]


def _check_nodes(result: Graph) -> None:
    for name, gm in result.functions.items():
        gm.graph.lint()
        for node in gm.graph.nodes:
            where = f"function '{name}': '{node.name}'"
            require(node.op == "output" or "val" in node.meta, f"{where} has no meta['val']; call propagate_shapes")
        for node in compute_nodes(gm):
            for key in ("rate", "unit"):
                require(
                    key in node.meta, f"function '{name}': '{node.name}' has no meta['{key}'], which partition needs"
                )
        run = copy_module(gm)
        for node in run.graph.nodes:
            node.meta.pop("val", None)
        propagate_shapes(run, result.inputs_of(name))
        for node, fresh in zip(gm.graph.nodes, run.graph.nodes, strict=True):
            said, true = value_text(node), value_text(fresh)
            require(
                node.op == "output" or said == true, f"function '{name}': '{node.name}' says {said} and gives {true}"
            )


def _check_weights(graph: Graph, result: Graph) -> None:
    known = {t for w in graph.weights.values() for t in w.source.tensors}
    for function, gm in result.functions.items():
        for name, value in (*gm.named_parameters(), *gm.named_buffers()):
            require(name in result.weights, f"function '{function}' uses '{name}', which the graph has no weight for")
            shape = tuple(value.shape)
            have = result.weights[name].shape
            require(have == shape, f"weight '{name}' is {list(have)} and the module's parameter {list(shape)}")
            require(value.is_meta, f"weight '{name}' holds numbers; graphs have parameters on the meta device only")
    for name, weight in without_scales(result.weights).items():  # these come from a calibration
        for tensor in weight.source.tensors:
            require(tensor in known, f"weight '{name}' comes from '{tensor}', which no weight came from before")


def _check_interface(made: Pass, graph: Graph, result: Graph) -> None:
    require(result.component == graph.component, f"the component is called '{result.component}' now")
    require(result.outputs == graph.outputs, f"outputs were {list(graph.outputs)} and are {list(result.outputs)}")
    require(result.gives == graph.gives, "what outputs stand for (gives) is not what it was")
    require(result.inputs == graph.inputs, "inputs are not what they were")
    for name in (*graph.functions, *made.adds_to(graph.functions)):
        require(name in result.functions, f"function '{name}' is missing")
    for name, gm in result.functions.items():
        before, shown = graph.functions.get(name), value_text
        if before is None:  # what is new may be for another size
            before, shown = graph.functions["base"], _kind
        for what, values in (("takes", _taken), ("gives", _given)):
            was, now = values(before, shown), values(gm, shown)
            require(was == now, f"function '{name}' {what} {now}; needed is {was}")
    if made.phase == "partition":
        missing = [n.name for gm in result.functions.values() for n in compute_nodes(gm) if "block" not in n.meta]
        require(not missing, f"'{missing[0] if missing else ''}' has no block")


def _taken(gm: fx.GraphModule, shown: Callable[[fx.Node], str]) -> list[str]:
    return [f"{n.target} {shown(n)}" for n in gm.graph.nodes if n.op == "placeholder"]


def _given(gm: fx.GraphModule, shown: Callable[[fx.Node], str]) -> list[str]:
    return [shown(n) for n in output_values(gm)]


def _kind(node: fx.Node) -> str:
    """Type and number of dimensions of a node's value."""
    value = node.meta["val"]
    return f"{dtype_of(value.dtype).short} of {value.dim()} dimensions"


def _inputs(graph: Graph, function: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [sample_input(i, generator) for i in graph.inputs_of(function)]


def _check_base(graph: Graph, result: Graph) -> None:
    checkpoint = Checkpoint(graph.weights)
    inputs = _inputs(graph, "base")
    with torch.no_grad():
        was, now = (materialise(g.functions["base"], checkpoint.values(g.weights))(*inputs) for g in (graph, result))
    for name, a, b in zip(graph.outputs, was, now, strict=True):
        _require_same(f"output '{name}' of 'base'", b, a)


def _require_same(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    require(found.shape == wanted.shape, f"{what} is {list(found.shape)}; needed is {list(wanted.shape)}")
    error = float((found.double() - wanted.double()).norm()) / max(float(wanted.double().norm()), 1e-30)
    require(error <= SAME, f"{what} is off by a relative error of {error:.3g}")


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: torch.nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _check_blocks(result: Graph) -> None:
    """Run the blocks one after the other, each function by itself, and hold what they give against the whole."""
    checkpoint = Checkpoint(result.weights)
    blocks = extract_blocks(result)
    values_of_base = _run(result, "base", checkpoint)
    tables = {f"tables.{k}": values_of_base[n] for k, n in table_nodes(result).items()}
    for function, gm in result.functions.items():
        whole = values_of_base if function == "base" else _run(result, function, checkpoint)
        wanted = {name: whole[node] for name, node in zip(result.outputs, output_values(gm), strict=True)}
        specs = result.inputs_of(function)
        given = zip(specs, _inputs(result, function), strict=True)
        values: dict[str, torch.Tensor] = tables | {f"inputs.{i.name}": v for i, v in given}
        found: dict[str, torch.Tensor] = {k.removeprefix("tables."): v for k, v in tables.items()}
        for block in blocks:
            for port in block.inputs:
                source = block.sources[port.name]
                require(source in values, f"block '{block.name}' needs '{source}', which no block before it gives")
            own = checkpoint.values(block.weights)
            with torch.no_grad():
                results = block.module(function, own)(*(values[block.sources[p.name]] for p in block.inputs))
            ports = block.signatures[function].outputs
            for port, given_value in zip(ports, results, strict=True):
                require(
                    tuple(given_value.shape) == port.shape, f"block '{block.name}': '{port.name}' has another shape"
                )
                values[f"{block.name}.{port.name}"] = given_value
                if port.name in block.results:
                    found[block.results[port.name]] = given_value
        for name, value in wanted.items():
            require(name in found, f"no block of '{function}' gives the output '{name}'")
            _require_same(f"'{function}': output '{name}' of the blocks in a row", found[name], value)


def _run(graph: Graph, function: str, checkpoint: Checkpoint) -> Mapping[fx.Node, Any]:
    gm = graph.functions[function]
    recorder = _Recorder(materialise(gm, checkpoint.values(graph.weights)), gm.graph)
    with torch.no_grad():
        recorder.run(*_inputs(graph, function))
    return recorder.values


def _check_refusal(made: Pass, graph: Graph) -> None:
    try:
        made(graph)
    except LoweringError as e:
        require_refusal(e, made.name, graph.component)
        return
    except Exception as e:
        raise AssertionError(
            f"fails on {graph.component} with {type(e).__name__} ({e}) instead of LoweringError"
        ) from e
    raise AssertionError(f"takes the graph of {graph.component} that it says it cannot")
