"""What a whole video asks of a device: blocks with their weights, and calls of blocks in the order in which they run.

Plain data without torch. A long run is periodic (30 steps of the same 30 blocks), so calls stand in phases, each a list
of calls that is repeated. Times are seconds, sizes are bytes. docs/planning.md explains the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import cast

from toolchain.formats.loading import BlockData, CallData, PhaseData, WholeRunData


@dataclass(frozen=True)
class Block:
    """What is loaded and freed as one: ``weight_bytes`` are held from the start of its load until it is freed.

    ``load_s`` is how long loading takes while nothing runs, all overhead included.
    """

    name: str
    weight_bytes: int
    load_s: float

    def __post_init__(self) -> None:
        _check(f"block '{self.name}'", weight_bytes=self.weight_bytes, load_s=self.load_s)


@dataclass(frozen=True)
class Call:
    """One execution of a function of a block.

    ``compute_s`` is how long it runs while nothing loads. ``live_bytes`` are held from its start until the next call's:
    tables, and all that later calls read (the residual stream, the prompt's embedding, this call's own results).
    ``activation_bytes`` are what it holds besides, while it runs, such as inputs that nothing reads after it.
    """

    block: str
    function: str
    compute_s: float
    activation_bytes: int = 0
    live_bytes: int = 0

    def __post_init__(self) -> None:
        where = f"call of '{self.block}'"
        _check(where, compute_s=self.compute_s, activation_bytes=self.activation_bytes, live_bytes=self.live_bytes)


@dataclass(frozen=True)
class Phase:
    """``calls`` in order, ``times`` times over; ``name`` is for people."""

    name: str
    calls: tuple[Call, ...]
    times: int = 1

    def __post_init__(self) -> None:
        if not self.calls or self.times < 1:
            raise ValueError(f"phase '{self.name}' has {len(self.calls)} calls, {self.times} times; needs one or more")


@dataclass(frozen=True)
class Run:
    """A whole run: phases one after the other.

    Raises:
        ValueError: a number is negative, infinite or NaN, a call's block is missing, or nothing is called.
    """

    blocks: tuple[Block, ...]
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if len(self.by_name) != len(self.blocks):
            raise ValueError("two blocks have the same name")
        if not self.phases:
            raise ValueError("a run without phases")
        for phase in self.phases:
            for call in phase.calls:
                if call.block not in self.by_name:
                    raise ValueError(f"phase '{phase.name}' calls '{call.block}', which is no block")

    @cached_property
    def by_name(self) -> Mapping[str, Block]:
        return {b.name: b for b in self.blocks}

    def calls(self) -> Iterator[Call]:
        """Every call, in order, repeated ones as often as they run."""
        for phase in self.phases:
            for _ in range(phase.times):
                yield from phase.calls

    @property
    def compute_s(self) -> float:
        """How long all calls run, without loading."""
        return sum(p.times * c.compute_s for p in self.phases for c in p.calls)

    def to_data(self) -> WholeRunData:
        """Plain data, as JSON and a manifest have it."""
        blocks = [cast(BlockData, asdict(b)) for b in self.blocks]
        phases = [
            PhaseData(name=p.name, times=p.times, calls=[cast(CallData, asdict(c)) for c in p.calls])
            for p in self.phases
        ]
        return {"blocks": blocks, "phases": phases}

    @classmethod
    def from_data(cls, data: WholeRunData) -> Run:
        """The run that :meth:`to_data` gave, as a manifest that was read has it."""
        phases = (Phase(p["name"], tuple(Call(**c) for c in p["calls"]), p["times"]) for p in data["phases"])
        return cls(tuple(Block(**b) for b in data["blocks"]), tuple(phases))


def _check(where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{where}: {name} is {number}; it has to be zero or more, and finite")
