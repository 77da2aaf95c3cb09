"""Where to cut a chain of units so that every block stays within a budget: fewest blocks first, then balanced ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from toolchain.ir.blocks import Block
from toolchain.ir.target import Target
from toolchain.ir.weights import WeightSource

Cost = Callable[[int, int], int]
"""What a block of the units from the first number up to, but without, the second one needs."""


def cut(count: int, cost: Cost, most: int) -> list[tuple[int, int]] | None:
    """Ranges of ``count`` units in a row: the fewest that cost at most ``most``; of these, the least largest cost.

    A range must not cost less than one within it. None if a unit alone costs too much.
    """
    best: list[tuple[int, int, int] | None] = [(0, 0, 0)] + [
        None
    ] * count  # blocks, largest cost, where the last begins
    for end in range(1, count + 1):
        for begin in range(end - 1, -1, -1):
            before, own = best[begin], cost(begin, end)
            if own > most:
                break
            if before is None:
                continue
            found = (before[0] + 1, max(before[1], own), begin)
            if best[end] is None or found[:2] < best[end][:2]:  # type: ignore[index]
                best[end] = found
    ranges = []
    end = count
    while end:
        last = best[end]
        if last is None:
            return None
        ranges.append((last[2], end))
        end = last[2]
    return ranges[::-1]


class Needs:
    """What blocks of several units need, reckoned from the units alone, each looked at once.

    While a unit runs, its block holds all weights and ports of the block, the values between its units that are
    needed then, and what the unit itself makes. Liveness over the whole block gives no more, and less where a value
    between units ends within one: so a block may be cut that would just have fitted. A target that plans otherwise
    may need more, so a cut is to be held against :meth:`Target.peak`.

    Args:
        units: every unit as a block of its own, in order.
    """

    def __init__(self, units: Sequence[Block], target: Target) -> None:
        self.weights = [{w.source: w.bytes for w in u.weights.values()} for u in units]
        known: dict[str, dict[str, int]] = {}
        self._inner: list[dict[str, int]] = []
        for unit in units:
            if (structure := unit.structure()) not in known:
                peaks = {f: target.peak(unit, target.operators(unit, f)) for f in unit.functions}
                known[structure] = {f: p.bytes - p.ports for f, p in peaks.items()}
            self._inner.append(known[structure])
        place = {u.name: i for i, u in enumerate(units)}
        self._values: dict[str, list[tuple[int, int, list[int], int]]] = {f: [] for f in units[0].functions}
        for function, values in self._values.items():
            uses: dict[str, list[int]] = {}
            sizes: dict[str, int] = {}
            kept: set[str] = set()
            for i, unit in enumerate(units):
                for port in unit.signatures[function].inputs:
                    uses.setdefault(unit.sources[port.name], []).append(i)
                    sizes[unit.sources[port.name]] = target.value_bytes(port)
                for port in unit.signatures[function].outputs:
                    sizes[f"{unit.name}.{port.name}"] = target.value_bytes(port)
                    if port.name in unit.results:
                        kept.add(f"{unit.name}.{port.name}")
            for source, size in sizes.items():
                used = uses.get(source, [])
                until = len(units) if source in kept else max(used, default=0)
                values.append((place.get(source.split(".")[0], -1), until, used, size))

    def __call__(self, begin: int, end: int) -> int:
        return max(self.of(f, begin, end) for f in self._values)

    def of(self, function: str, begin: int, end: int) -> int:
        """Bytes of weights and activations that a function of a block of units needs."""
        shared: Mapping[WeightSource, int] = {s: n for own in self.weights[begin:end] for s, n in own.items()}
        ports = 0
        within = [0] * (end - begin)
        for made, until, used, size in self._values[function]:
            if begin <= made < end:
                if until >= end:
                    ports += size
                else:
                    for i in range(made, until + 1):
                        within[i - begin] += size
            elif any(begin <= i < end for i in used):
                ports += size
        most = max(self._inner[i][function] + within[i - begin] for i in range(begin, end))
        return sum(shared.values()) + ports + most
