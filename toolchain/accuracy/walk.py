"""What broke: a block's graph walked step by step, the artifact's numbers held against eager float32's.

Converters keep the names of steps (see ``targets.exporting``), so an engine that can trace shows what each step of
the artifact gave. A step's *own* error is what it gave against what eager float32 makes of the artifact's inputs to
it: errors that came in do not count, so the first step with an error of its own is the one to blame.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from torch import fx

from toolchain.accuracy.metrics import compare, scaled
from toolchain.accuracy.references import Case, Weights
from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, Port, Signature
from toolchain.ir.dtypes import DTYPES, FLOAT16_MAX, dtype_of
from toolchain.ir.graph import output_node
from toolchain.ir.target import STEP, Engine, OpValue, Target, TracingEngine, distinct_functions

Cause = Literal["overflow", "precision", "wrong"]
ROUNDING = 16.0
"""How many times the error of rounding a step's inputs and weights may be, and still be put down to rounding."""
ACCUMULATED = 2.0**-20
"""A relative error that sums of float32 have; smaller ones are never worth a word."""
CAUSES: Mapping[Cause, str] = {
    "overflow": "a number is larger than {limit:.0f}, the largest of float16; scale the stream, or use float32 here",
    "precision": "rounding to {precision} explains it; use float32 for this component",
    "wrong": "rounding does not explain it: a weight, a constant or the operator is wrong",
}


@dataclass(frozen=True)
class Row:
    """A step of the graph, or an operator of it, as the artifact computed it.

    ``error`` is against eager float32 from the block's inputs on; ``own`` against eager float32 on what the artifact
    gave to this step, None where the artifact's value could not be told from others.
    """

    step: str
    op: str
    dtype: str
    low: float
    high: float
    error: float | None
    own: float | None


@dataclass(frozen=True)
class Explanation:
    """Where a function of a block goes wrong."""

    block: str
    function: str
    rows: tuple[Row, ...]
    operators: Mapping[str, tuple[Row, ...]]
    culprit: str | None
    cause: Cause | None
    verdict: str

    def text(self) -> str:
        """The table, steps in order; operators of the step that is to blame below it."""
        head = f"{self.block}, {self.function}: what the artifact gave, step by step"
        lines = [head, f"  {'step':40} {'dtype':8} {'lowest':>10} {'highest':>10} {'error':>9} {'own':>9}"]
        for row in self.rows:
            mark = " <- here" if row.step == self.culprit else ""
            lines.append("  " + _line(row.step, row) + mark)
            if row.step == self.culprit:
                lines += ["    " + _line(f"{o.op} {o.step}", o) for o in self.operators.get(row.step, ())]
        return "\n".join([*lines, f"  {self.verdict}"])


def _line(name: str, row: Row) -> str:
    figures = " ".join(f"{v:9.2g}" if v is not None else f"{'-':>9}" for v in (row.error, row.own))
    return f"{name:40.40} {row.dtype:8} {row.low:10.4g} {row.high:10.4g} {figures}"


def explain(block: Block, weights: Weights, case: Case, engine: Engine, target: Target, limit: float) -> Explanation:
    """Walk a function of ``block`` on the inputs of an eager run.

    Args:
        block: as it was lowered; ``weights`` by its own names.
        case: an eager run of the function that is off.
        engine: the artifact, loaded. If it cannot trace, the block is lowered again with every step's value as an
            output, which shows what lowering does and not what was done to the artifact since.
        limit: the gate's relative error.
    """
    function = block.own_function(case.function)
    inputs = scaled(case.inputs, block.inputs)
    held = dict(weights)
    if hasattr(engine, "trace"):
        traced = list(cast(TracingEngine, engine).trace(case.function, inputs))
    else:
        traced = list(_lowered_again(block, function, held, inputs, target))
    walk = _Walk(block, function, held, inputs, traced)
    culprit = _culprit(walk.rows, limit, _noise(target.precision))
    if culprit is None:
        verdict = "no step of the graph has an error of its own; what comes in is off, or the legal form is"
        return Explanation(block.name, function, tuple(walk.rows), walk.operators, None, None, verdict)
    cause = walk.cause(culprit, target.precision)
    text = CAUSES[cause].format(limit=FLOAT16_MAX, precision=target.precision)
    verdict = f"it goes wrong at step '{culprit}' ({cause}): {text}"
    return Explanation(block.name, function, tuple(walk.rows), walk.operators, culprit, cause, verdict)


def _noise(precision: str) -> float:
    """The relative error that rounding to ``precision`` gives, and sums in float32 anyway."""
    return max(DTYPES[precision].rounding, ACCUMULATED)


def _culprit(rows: Sequence[Row], limit: float, noise: float) -> str | None:
    """The first step whose own error is over the limit, or else the step with the largest."""
    own = [(r.step, math.inf if math.isnan(r.own) else r.own) for r in rows if r.own is not None]
    first = next((step for step, error in own if error > limit), None)
    if first is not None:
        return first
    worst = max(own, key=lambda pair: pair[1], default=("", 0.0))
    return worst[0] if worst[1] > noise else None


class _Walk(fx.Interpreter):
    """Runs a block's function eagerly, twice at once: from its inputs on, and on what the artifact gave."""

    def __init__(
        self, block: Block, function: str, weights: Weights, inputs: Mapping[str, torch.Tensor], traced: list[OpValue]
    ) -> None:
        self.gm = block.module(function, weights)
        super().__init__(self.gm, garbage_collect_values=False)
        steps = [n for n in self.gm.graph.nodes if n.op in ("call_module", "call_function")]
        self.labels = {_label(n): n.name for n in steps}
        self.by_step = _sort(traced, self.labels)
        self.rows: list[Row] = []
        self.operators: dict[str, tuple[Row, ...]] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.artifact: dict[fx.Node, Any] = {}
        self._given = [inputs[p.name] for p in block.inputs]
        self._outputs = {
            n: port.name for n, port in zip(_results(self.gm), block.signatures[function].outputs, strict=True)
        }
        self._named = {v.name: v for v in traced}
        with torch.no_grad():
            self.run(*self._given)

    def run_node(self, n: fx.Node) -> Any:
        plain = super().run_node(n)
        if n.op not in ("call_module", "call_function"):
            self.artifact[n] = plain
            return plain
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self.artifact.__getitem__)
        expected = getattr(self, n.op)(n.target, args, kwargs)
        given = self._value_of(n, expected)
        self.artifact[n] = expected if given is None else given
        if isinstance(plain, torch.Tensor):
            shown = given if given is not None else expected
            owner = cast(fx.Node, n.args[0]) if n.target is operator.getitem else n
            name = f"{owner.name}[{n.args[1]}]" if owner is not n else n.name
            dtypes = {v.dtype for v in self.by_step.get(owner.name, ())[-1:]}
            self.rows.append(
                Row(
                    name,
                    "",
                    "".join(dtypes) if given is not None else "-",
                    *_range(shown),
                    None if given is None else _error(given, plain),
                    None if given is None else _error(given, expected),
                )
            )
            self.nodes[name] = n
            values = self.by_step.get(owner.name, ())
            self.operators[name] = tuple(Row(v.name, v.op, v.dtype, *_range(v.value), None, None) for v in values)
        return plain

    def _value_of(self, n: fx.Node, expected: Any) -> torch.Tensor | None:
        """What the artifact gave for a step: the last of its values that has the size, and is used elsewhere."""
        if not isinstance(expected, torch.Tensor):
            return None
        if n in self._outputs and self._outputs[n] in self._named:
            return _shaped(self._named[self._outputs[n]].value, expected)
        own = [v for v in self.by_step.get(n.name, ()) if v.value.numel() == expected.numel()]
        source = n.args[0] if n.args else None
        if not own and isinstance(source, fx.Node) and isinstance(n.args[-1], int):  # one of several results
            many = [v for v in self.by_step.get(source.name, ()) if v.value.numel() == expected.numel()]
            results = list(source.users)
            if len(many) == len(results):
                return _shaped(many[results.index(n)].value, expected)
            return None
        return _shaped(own[-1].value, expected) if own else None

    def cause(self, step: str, precision: str) -> Cause:
        """Whether a step's error is overflow, rounding, or neither."""
        node = self.nodes[step]
        values = [v.value for v in self.by_step.get(node.name, ())]
        result = self.artifact[node]
        checked = [*values, result] if isinstance(result, torch.Tensor) else values
        if any(v.is_floating_point() and not bool(torch.isfinite(v).all()) for v in checked):
            return "overflow"
        dtype = DTYPES[precision].torch
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.artifact.__getitem__)
        expected = getattr(self, node.op)(node.target, args, kwargs)

        def rounded(value: Any) -> Any:
            return value.to(dtype).float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        kept: dict[str, torch.Tensor] = {}
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None:
            kept = {k: p.data for k, p in module.named_parameters()}
            for p in module.parameters():
                p.data = rounded(p.data)
        again = getattr(self, node.op)(
            node.target, torch.utils._pytree.tree_map(rounded, args), torch.utils._pytree.tree_map(rounded, kwargs)
        )
        if module is not None:
            for k, p in module.named_parameters():
                p.data = kept[k]
        rounding = max(_error(rounded(again), expected), _noise(precision))
        return "precision" if _error(result, expected) <= ROUNDING * rounding else "wrong"


def _results(gm: fx.GraphModule) -> list[fx.Node]:
    results = output_node(gm).args[0]
    return list(cast(Sequence[fx.Node], results if isinstance(results, tuple) else (results,)))


def _label(node: fx.Node) -> str:
    """How a step is called in an artifact: a leaf by its path, a function by its node."""
    return str(node.target).replace(".", "_") if node.op == "call_module" else node.name


def _sort(traced: Sequence[OpValue], labels: Mapping[str, str]) -> dict[str, list[OpValue]]:
    """An artifact's values by step. One that a converter renamed belongs where its weight or its latest input does."""
    step_of: dict[str, str] = {}
    by_step: dict[str, list[OpValue]] = {}
    longest = sorted(labels, key=len, reverse=True)
    order = {step: i for i, step in enumerate(labels.values())}

    def owner(constant: str) -> str | None:
        name = constant.replace(".", "_").removeprefix("p_").removeprefix("b_")  # exporting marks what they are
        return next((labels[k] for k in longest if name.startswith(f"{k}_")), None)

    for value in traced:
        label, parted, _ = value.name.partition(STEP)
        step = labels.get(label) if parted else None
        if step is None:
            constants = [i for i in value.inputs if i not in step_of]
            step = next((s for s in map(owner, constants) if s is not None), None)
        if step is None:
            step = max((step_of[i] for i in value.inputs if i in step_of), key=order.__getitem__, default=None)
        if step is not None:
            step_of[value.name] = step
            by_step.setdefault(step, []).append(value)
    return by_step


def _shaped(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    return value.detach().to(like.dtype).reshape(like.shape) if value.numel() == like.numel() else None


def _range(value: Any) -> tuple[float, float]:
    if not isinstance(value, torch.Tensor) or not value.numel():
        return 0.0, 0.0
    low, high = value.float().aminmax()
    return float(low), float(high)


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return compare({"": value}, {"": expected}, math.inf).relative_error


def _lowered_again(
    block: Block, function: str, weights: Weights, inputs: Mapping[str, torch.Tensor], target: Target
) -> Iterator[OpValue]:
    """Lower one function with every step's value as an output, and run it."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(block.functions[function].graph, copied)
    shown = {
        _label(n): n
        for n in block.functions[function].graph.nodes
        if n.op in ("call_module", "call_function") and isinstance(n.meta["val"], torch.Tensor)
    }
    graph.output(tuple(copied[n] for n in shown.values()))
    gm = fx.GraphModule(block.functions[function], graph, class_name="Block")
    own = block.signatures[function]
    outputs = tuple(Port(f"{k}{STEP}value", tuple(n.meta["val"].shape), n.meta["val"].dtype) for k, n in shown.items())
    every = Block(
        block.component,
        block.name,
        block.rate,
        {"base": gm},
        {"base": Signature(own.inputs, outputs)},
        block.sources,
        {n: dataclasses.replace(w, storage=w.storage.uncalibrated) for n, w in block.weights.items()},
    )
    assert distinct_functions(every) == ("base",)
    with TemporaryDirectory() as folder:
        artifact = target.lower(every, weights, Path(folder) / f"steps{target.suffix}")
        try:
            results = target.engine(artifact.path, own.inputs, outputs)("base", inputs)
        except LoweringError:
            return
    for name, value in results.items():
        yield OpValue(name, "step", dtype_of(value.dtype).name, value, ())
