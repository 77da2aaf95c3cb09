"""How many bytes a function of a block holds at most while it runs: liveness over its operators.

A value lives from the operator that makes it to the last one that reads it, or a view of it. What a block takes and
gives lives all along. Weights are not counted, nor what is computed from weights alone, which converters fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.ir.blocks import Port
    from toolchain.ir.operators import Operator, OperatorGraph, Value


@dataclass(frozen=True)
class Effect:
    """What an operator does to memory on a target.

    ``view``: its results lie where its first operand does, and cost nothing. ``in_place``: a result is written over
    an operand of its size that nothing reads any more. ``scratch`` bytes are held while it runs, and no longer.
    """

    view: bool = False
    in_place: bool = False
    scratch: int = 0


@dataclass(frozen=True)
class Peak:
    """The most bytes that are held at once; ``operator`` is the one that runs then, ``index`` its place."""

    bytes: int
    ports: int
    """Of them, what the function takes and gives."""
    operator: str
    index: int
    scratch: int = 0
    """Of them, scratch."""


def peak(
    graph: OperatorGraph, size: Callable[[Value | Port], int], effect: Callable[[Operator], Effect], late: int = 0
) -> Peak:
    """The peak of a function.

    Args:
        size: bytes of a port, or of a value in between.
        effect: what an operator does to memory.
        late: after how many more operators a runtime frees what is needed no more.
    """
    effects = [effect(operator) for operator in graph.operators]
    places = _Places(graph, effects, late)
    sizes = {place: size(value) for place, value in places.inner.items()}
    ports = sum(size(port) for port, _ in (*graph.inputs, *graph.outputs))
    found = Peak(ports, ports, "", -1)
    live = 0
    for i, (operator, own) in enumerate(zip(graph.operators, effects, strict=True)):
        added = sum(sizes[p] for p in places.made[i])
        freed = sum(sizes[p] for p in places.ended[i])
        if own.in_place and added in (sizes[p] for p in places.ended[i] if p not in places.made[i]):
            freed, added = freed - added, 0
        held = ports + live + added + own.scratch
        if held > found.bytes:
            found = Peak(held, ports, operator.name, i, own.scratch)
        live += added - freed
    return found


class _Places:
    """Where values lie: those that share memory have one place.

    ``inner`` are the places that hold neither ports nor constants, each with the value that it was made for; ``made``
    and ``ended`` say by operator which of them are new and which are needed no more after it.
    """

    def __init__(self, graph: OperatorGraph, effects: Sequence[Effect], late: int) -> None:
        self._of: dict[int, int | None] = {}
        self._by_memory: dict[int, int | None] = {}
        self._count = 0
        self.inner: dict[int, Value] = {}
        self.made: list[list[int]] = [[] for _ in effects]
        self.ended: list[list[int]] = [[] for _ in effects]
        for _, value in graph.inputs:
            self._put(value, self._new())
        last: dict[int, int] = {}
        for i, (operator, effect) in enumerate(zip(graph.operators, effects, strict=True)):
            reads = [self.find(v) for v in operator.reads]
            constant = not any(p is not None for p in reads)
            for value in operator.gives:
                if effect.view or constant:
                    self._put(value, reads[0] if reads else None)
                    continue
                place = self._new()
                self._put(value, place)
                self.inner[place] = value
                self.made[i].append(place)
                last[place] = i
            last |= {p: i for p in reads if p is not None and p in self.inner}
        for _, value in graph.outputs:
            found = self.find(value)
            if found is None or found not in self.inner:
                continue
            if self.inner[found].elements == value.elements:
                del self.inner[found]  # made where the output lies
            else:
                last[found] = len(effects) - 1  # the output is copied out of it
        for i, made in enumerate(self.made):
            self.made[i] = [p for p in made if p in self.inner]
        for place in self.inner:
            self.ended[min(last[place] + late, len(effects) - 1)].append(place)

    def find(self, value: Value) -> int | None:
        """The place of a value; None for weights and what is computed from them alone."""
        if value.number in self._of:
            return self._of[value.number]
        return self._by_memory.get(value.memory)

    def _new(self) -> int:
        self._count += 1
        return self._count

    def _put(self, value: Value, place: int | None) -> None:
        self._of[value.number] = place
        self._by_memory.setdefault(value.memory, place)
