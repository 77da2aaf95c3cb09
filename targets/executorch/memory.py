"""How an ExecuTorch program with XNNPACK plans memory, and what its functions therefore need at most.

XNNPACK takes stretches of operators whole, between those that it has no kernels for. So there are two memories, one
beside the other: the program's own plan, with all that stretches and other operators hand one another, and XNNPACK's
workspace, as large as the most demanding stretch needs for what it makes and uses itself. The partitioner puts every
operator into the latest stretch that it can be in. Weights are packed when a function is loaded: the packed copy is
what stays, the file's own pages are mapped and can be dropped, so they are counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from toolchain.ir.blocks import Port
from toolchain.ir.memory import Effect, Peak, peak
from toolchain.ir.operators import Operator, OperatorGraph, Value

OUTSIDE = frozenset({"layer_norm", "group_norm", "mean", "amax", "embedding", "sin", "cos", "interpolate"})
"""Operators that XNNPACK is not given."""
NO_COPY = frozenset({"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"})
IN_PLACE = frozenset({"add", "sub", "mul", "truediv", "div", "sigmoid", "silu", "relu", "tanh", "softmax", "clamp"})

Size = Callable[[Value | Port], int]


def program_peak(graph: OperatorGraph, size: Size) -> Peak:
    """The plan's peak and the workspace's together."""
    inside = [o.name not in OUTSIDE for o in graph.operators]
    stretch = _stretches(graph, inside)
    parts: dict[int, list[int]] = {}
    for i, number in enumerate(stretch):
        parts.setdefault(number, []).append(i)
    crossing = _crossing(graph, stretch)
    handed = [_merged([graph.operators[i] for i in parts[n]], crossing) for n in sorted(parts, reverse=True)]
    planned = peak(
        OperatorGraph(tuple(handed), graph.inputs, graph.outputs), size, lambda o: Effect(view=o.name in NO_COPY)
    )
    workspace = max(
        (_workspace(graph, [i for i in own if inside[i]], crossing, size) for own in parts.values()), default=0
    )
    return Peak(planned.bytes + workspace, planned.ports, planned.operator, planned.index, workspace)


def _stretches(graph: OperatorGraph, inside: Sequence[bool]) -> list[int]:
    """A number for every operator, counted from the end: XNNPACK's have the even ones, all others the odd ones."""
    numbers = [0] * len(graph.operators)
    users: dict[int, list[int]] = {}
    for i, operator in enumerate(graph.operators):
        for value in operator.reads:
            users.setdefault(value.number, []).append(i)
    for i in range(len(numbers) - 1, -1, -1):
        later = [numbers[u] for v in graph.operators[i].gives for u in users.get(v.number, ())]
        latest = max(later, default=0)
        numbers[i] = latest if latest % 2 == (not inside[i]) else latest + 1
    return numbers


def _crossing(graph: OperatorGraph, stretch: Sequence[int]) -> set[int]:
    """Numbers of the values that leave the stretch that makes them."""
    made = {v.number: stretch[i] for i, o in enumerate(graph.operators) for v in o.gives}
    found = {v.number for _, v in graph.outputs}
    for i, operator in enumerate(graph.operators):
        found |= {v.number for v in operator.reads if made.get(v.number, stretch[i]) != stretch[i]}
    return found


def _merged(operators: Sequence[Operator], crossing: Collection[int]) -> Operator:
    """A stretch as one operator: what comes in from others, and what others read."""
    own = {v.number for o in operators for v in o.gives}
    reads = {v.number: v for o in operators for v in o.reads if v.number not in own}
    gives = {v.number: v for o in operators for v in o.gives if v.number in crossing}
    name = operators[0].name if len(operators) == 1 else "stretch"
    return Operator(name, tuple(reads.values()), tuple(gives.values()))


def _workspace(graph: OperatorGraph, own: Sequence[int], crossing: Collection[int], size: Size) -> int:
    """The peak of what a stretch makes and nobody else sees, elementwise operators writing where they read."""
    operators = [graph.operators[i] for i in own]
    made = {v.number for o in operators for v in o.gives}
    outside = {
        v.number: v for o in operators for v in (*o.reads, *o.gives) if v.number in crossing or v.number not in made
    }
    ports = tuple((Port(str(n), v.shape, v.dtype), v) for n, v in outside.items() if v.weight is None)
    within = OperatorGraph(tuple(operators), tuple(p for p in ports if p[1].number not in made), ())
    held = tuple(p for p in ports if p[1].number in made)
    found = peak(OperatorGraph(within.operators, within.inputs, held), size, _effect(size))
    return found.bytes - found.ports


def _effect(size: Size) -> Callable[[Operator], Effect]:
    def effect(operator: Operator) -> Effect:
        # a product of two activations packs the second one first
        packed = sum(size(v) for v in operator.reads[1:2]) if operator.name in ("bmm", "matmul") else 0
        return Effect(view=operator.name in NO_COPY, in_place=operator.name in IN_PLACE, scratch=packed)

    return effect
