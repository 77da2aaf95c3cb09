"""Ranges of a denoiser's blocks that steps may reuse: one stream goes in, and comes out in the same shape."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toolchain.errors import RecipeError
from toolchain.formats.calls import STEP
from toolchain.formats.reuse import Reuse
from toolchain.ir.blocks import Block, Port
from toolchain.ir.target import Target


@dataclass(frozen=True)
class Observed:
    """What a rule observes: ``source`` is ``BLOCK.OUTPUT``; ``bytes`` are by function."""

    source: str
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class Range:
    """Blocks in a row. ``input`` and ``output`` are ``BLOCK.OUTPUT``; ``bytes`` of the output are by function."""

    blocks: tuple[str, ...]
    input: str
    output: str
    bytes: Mapping[str, int]
    observed: Observed | None = None
    """For a rule that chooses the steps which reuse it."""

    @property
    def name(self) -> str:
        """First and last block."""
        return "-".join(dict.fromkeys((self.blocks[0], self.blocks[-1])))


class _NoRangeError(Exception):
    """Why blocks are no range."""


def find_ranges(asked: Sequence[Reuse], blocks: Sequence[Block], target: Target) -> list[Range]:
    """The range of each entry of a recipe.

    Args:
        blocks: all of the denoiser's, in their order, as ``target`` lowers them.

    Raises:
        RecipeError: names the key, and why there is no such range.
    """
    found: list[Range] = []
    for own in asked:
        range_ = _longest(blocks, target) if own.blocks is None else _between(own.blocks, blocks, target)
        if range_.blocks in [r.blocks for r in found]:
            raise RecipeError(
                f"sampler.reuse: two entries are for the blocks {' to '.join(_ends(range_))}; list their steps in one"
            )
        found.append(range_ if own.rule is None else _observing(own.observes or range_.input, range_, blocks, target))
    return found


def _observing(source: str, range_: Range, blocks: Sequence[Block], target: Target) -> Range:
    own = [b for b in blocks if b.rate == STEP]
    before = own[: [b.name for b in own].index(range_.blocks[0])]
    ports = {f"{b.name}.{p.name}": (b, p.name) for b in before for p in b.outputs}
    if source not in ports:
        raise RecipeError(
            f"sampler.reuse.observes: '{source}' comes out of no block of a step before the range; there are "
            f"{', '.join(ports)}"
        )
    return replace(range_, observed=Observed(source, _bytes(*ports[source], own, target)))


def _bytes(giver: Block, port: str, blocks: Sequence[Block], target: Target) -> dict[str, int]:
    """Bytes of an output by the function that is asked for, of all that ``blocks`` have."""
    functions = dict.fromkeys(f for b in blocks for f in b.functions)
    return {f: target.value_bytes(_given(giver, port, f)) for f in functions}


def _ends(range_: Range) -> tuple[str, str]:
    return range_.blocks[0], range_.blocks[-1]


def _between(ends: Sequence[str], blocks: Sequence[Block], target: Target) -> Range:
    names = [b.name for b in blocks if b.rate == STEP]
    for name in ends:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"those of a step are {', '.join(names)}"
            raise RecipeError(f"sampler.reuse.blocks: no block of a step is called '{name}'; {hint}")
    begin, end = (names.index(name) for name in ends)
    if begin > end:
        raise RecipeError(f"sampler.reuse.blocks: '{ends[1]}' runs before '{ends[0]}'; name the first block first")
    try:
        return _range(blocks, names[begin : end + 1], target)
    except _NoRangeError as e:
        raise RecipeError(f"sampler.reuse.blocks: {ends[0]} to {ends[1]} cannot be reused: {e}") from e


def _longest(blocks: Sequence[Block], target: Target) -> Range:
    names = [b.name for b in blocks if b.rate == STEP]
    for length in range(len(names), 0, -1):
        for begin in range(len(names) - length + 1):
            try:
                return _range(blocks, names[begin : begin + length], target)
            except _NoRangeError:
                continue
    raise RecipeError(
        "sampler.reuse: into no range of blocks goes a stream that comes out of it in the same shape; leave 'reuse' out"
    )


def _range(blocks: Sequence[Block], names: Sequence[str], target: Target) -> Range:
    """The range of blocks with these names, which follow one another."""
    by_name = {b.name: b for b in blocks}
    outside = {s for b in blocks if b.name not in names for s in b.sources.values()}
    leaving = [
        (by_name[n], p.name)
        for n in names
        for p in by_name[n].outputs
        if f"{n}.{p.name}" in outside or p.name in by_name[n].results
    ]
    if len(leaving) != 1:
        values = ", ".join(f"{b.name}.{port}" for b, port in leaving) or "nothing"
        raise _NoRangeError(f"one value has to come out of them, and that is {values}")
    giver, output = leaving[0]
    first = by_name[names[0]]
    streams = []
    for source in first.sources.values():
        other = by_name.get(source.partition(".")[0])
        if other is not None and other.rate == STEP and other.name not in names:
            streams.append((other, source.partition(".")[2]))
    alike = [(b, p) for b, p in streams if _kinds(b, p, giver, output)]
    if len(alike) != 1:
        raise _NoRangeError(
            f"one value has to go into '{first.name}' that is alike '{giver.name}.{output}', which comes out, in shape "
            f"and type, and {'there is none' if not alike else 'there are several'}"
        )
    bytes_ = _bytes(giver, output, [b for b in blocks if b.rate == STEP], target)
    before, stream = alike[0]
    return Range(tuple(names), f"{before.name}.{stream}", f"{giver.name}.{output}", bytes_)


def _kinds(one: Block, port: str, other: Block, output: str) -> bool:
    """Whether two outputs have one shape, type and scale, whatever function is asked for."""

    def kind(block: Block, name: str, function: str) -> tuple[object, ...]:
        own = _given(block, name, function)
        return own.shape, own.dtype, own.exact, own.scale

    return all(kind(one, port, f) == kind(other, output, f) for f in {**one.functions, **other.functions})


def _given(block: Block, port: str, function: str) -> Port:
    """An output as it is when ``function`` is asked for."""
    return next(p for p in block.signatures[block.own_function(function)].outputs if p.name == port)
