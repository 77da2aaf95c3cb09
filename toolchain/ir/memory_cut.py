"""Cutting a component by what its blocks need while they run: weights and the peak of activations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from toolchain.errors import LoweringError
from toolchain.ir.blocks import Block, extract_blocks
from toolchain.ir.cutting import Cost, Needs, cut
from toolchain.ir.graph import Graph, compute_nodes
from toolchain.ir.target import Target

Unit = tuple[str, ...]


def by_memory(graph: Graph, target: Target, most: int) -> dict[Unit, str]:
    """Block names by unit: layers in a row as the fewest blocks that need at most ``most`` bytes, as equal as they get.

    A layer that is too large is cut into its parts, which share blocks with no other layer. What was reckoned from
    units is held against the target's own peak of the blocks; where that is more, the cut is chosen again.

    Raises:
        LoweringError: a unit alone needs more; names it, its function and the least value that works.
    """
    base = graph.functions["base"]
    units = list(dict.fromkeys(n.meta["unit"] for n in compute_nodes(base) if n.meta["rate"] != "build"))
    alone = {u: f"unit_{i}" for i, u in enumerate(units)}
    by_name = {b.name: b for b in extract_blocks(_assigned(graph, alone))}
    ordered = [u for u in units if alone[u] in by_name]
    needs = Needs([by_name[alone[u]] for u in ordered], target)
    _hold_alone(ordered, needs, most, list(by_name["unit_0"].functions))
    known: dict[tuple[int, int], int] = {}
    peaks: dict[str, int] = {}
    while True:
        names, ranges = _cut_all(ordered, lambda i, j: known.get((i, j), needs(i, j)), most)
        blocks = {b.name: b for b in extract_blocks(_assigned(graph, names))}
        wrong = False
        for name, place in ranges.items():
            if place not in known:
                known[place] = needed(blocks[name], target, peaks)
                wrong = wrong or (known[place] > most and place[1] - place[0] > 1)
        if not wrong:
            return names


def needed(block: Block, target: Target, known: dict[str, int]) -> int:
    """Bytes of weights and of the largest peak of activations; ``known`` are peaks by structure."""
    structure = block.structure()
    if structure not in known:
        known[structure] = max(target.peak(block, target.operators(block, f)).bytes for f in block.functions)
    return block.weight_bytes + known[structure]


def _hold_alone(units: Sequence[Unit], needs: Needs, most: int, functions: Sequence[str]) -> None:
    costs = [needs(i, i + 1) for i in range(len(units))]
    least = max(costs)
    if least > most:
        i = costs.index(least)
        function = max(functions, key=lambda f: needs.of(f, i, i + 1))
        weights = sum(needs.weights[i].values())
        raise LoweringError(
            f"max_memory: '{'.'.join(units[i])}' alone needs {least / 1e6:.1f} MB in function '{function}' "
            f"({weights / 1e6:.1f} MB of weights, {(least - weights) / 1e6:.1f} MB of activations), more than "
            f"{most / 1e6:.1f} MB; the least value that works is {least}"
        )


def _cut_all(units: Sequence[Unit], cost: Cost, most: int) -> tuple[dict[Unit, str], dict[str, tuple[int, int]]]:
    """Names of blocks by unit, and the places of each block's units."""
    names: dict[Unit, str] = {}
    ranges: dict[str, tuple[int, int]] = {}
    place = {u: i for i, u in enumerate(units)}
    for stem, run in groupby(units, key=stem_of):
        if stem is None:
            names |= {u: ".".join(u) for u in run}
            continue
        layers = [list(parts) for _, parts in groupby(run, key=lambda u: u[0])]
        bins = [b for stretch in _stretches(layers, place, cost, most) for b in _bins(stretch, place, cost, most)]
        names |= names_of(stem, layers, bins)
    for unit, name in names.items():
        begin, end = ranges.get(name, (place[unit], place[unit]))
        ranges[name] = (min(begin, place[unit]), max(end, place[unit] + 1))
    return names, ranges


def _stretches(layers: Sequence[list[Unit]], place: dict[Unit, int], cost: Cost, most: int) -> list[list[list[Unit]]]:
    """Layers in a row that fit, each as one; and each that does not by itself, as its parts."""
    found: list[list[list[Unit]]] = [[]]
    for layer in layers:
        if cost(place[layer[0]], place[layer[-1]] + 1) <= most:
            found[-1].append(layer)
        else:
            found += [[[part] for part in layer], []]
    return [stretch for stretch in found if stretch]


def _bins(stretch: list[list[Unit]], place: dict[Unit, int], cost: Cost, most: int) -> list[list[Unit]]:
    ranges = cut(len(stretch), lambda i, j: cost(place[stretch[i][0]], place[stretch[j - 1][-1]] + 1), most)
    if ranges is None:  # a part alone, by the target's own reckoning
        ranges = [(i, i + 1) for i in range(len(stretch))]
    return [[u for layer in stretch[i:j] for u in layer] for i, j in ranges]


def _assigned(graph: Graph, names: dict[Unit, str]) -> Graph:
    graph = graph.copy()
    for gm in graph.functions.values():
        for node in compute_nodes(gm):
            node.meta["block"] = "tables" if node.meta["rate"] == "build" else names[node.meta["unit"]]
    return graph


def names_of(stem: str, layers: list[list[Unit]], bins: list[list[Unit]]) -> dict[Unit, str]:
    """``pair_03``, ``pair_03_05`` for a run of layers, ``pair_03_spatial`` for parts of a layer.

    Layers are numbered in the order in which they run.
    """
    number = {u: i for i, parts in enumerate(layers) for u in parts}
    width = len(str(len(layers) - 1))
    names: dict[Unit, str] = {}
    for packed in bins:
        first, last = number[packed[0]], number[packed[-1]]
        name = f"{stem}_{first:0{width}d}"
        if last > first:
            name = f"{name}_{last:0{width}d}"
        elif len(packed) < len(layers[first]):
            name = "_".join((name, *(".".join(u[1:]) for u in packed)))
        names |= dict.fromkeys(packed, name)
    return names


def stem_of(unit: Unit) -> str | None:
    """What a layer is one of: ``pair`` for ``pair.3``; None for a unit that stands alone."""
    stem, dot, _ = unit[0].partition(".")
    return stem if dot else None
