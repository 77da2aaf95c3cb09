"""A whole video as a run: what each block holds and takes, and in which order blocks are called.

Plain data without torch; a recipe's part of it is :mod:`toolchain.planning.video`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from toolchain.errors import BundleError
from toolchain.formats.calls import Round
from toolchain.formats.times import TimesFile
from toolchain.planning.loading.run import Block, Call, Phase, Run


@dataclass(frozen=True)
class Function:
    """A function of a block: ``held_bytes`` are all there are beside weights while it runs, ``left_bytes`` after it."""

    compute_s: float
    held_bytes: int
    left_bytes: int


@dataclass(frozen=True)
class Part:
    """A block of a component, ``COMPONENT/BLOCK``; it runs at ``rate``, and ``functions`` has the default one."""

    name: str
    rate: str
    weight_bytes: int
    load_s: float
    functions: Mapping[str, Function]
    default: str

    def call(self, function: str | None, beside_bytes: int) -> Call:
        """The call that asking for ``function`` leads to, with ``beside_bytes`` held by others throughout."""
        name = function if function is not None and function in self.functions else self.default
        own = self.functions[name]
        left = min(own.left_bytes, own.held_bytes)
        return Call(self.name, name, own.compute_s, own.held_bytes - left, left + beside_bytes)


def whole_run(
    parts: Mapping[str, Sequence[Part]], rounds: Iterable[Round], beside: Mapping[tuple[str, str], int]
) -> Run:
    """The run of a whole video: rounds that are alike, one after the other, are a phase. What never runs is left out.

    Args:
        parts: by component, blocks in the order in which they run.
        beside: bytes that are held all along the calls of a component's rate, by both.
    """
    phases = []
    for round_, group in groupby(rounds):
        held = beside.get((round_.component, round_.rate), 0) + round_.held_bytes
        own = [p for p in parts[round_.component] if p.rate == round_.rate]
        names = [p.name.partition("/")[2] for p in own]
        calls = tuple(
            part.call(round_.function, held + _kept_bytes(round_, names, place))
            for place, part in enumerate(own)
            if names[place] not in round_.skipped
        )
        if calls:
            less = f", without {len(round_.skipped)} blocks" if round_.skipped else ""
            name = f"{round_.component}, {round_.rate}: {round_.function or 'default'}{less}"
            phases.append(Phase(name, calls, len(list(group))))
    called = {call.block for phase in phases for call in phase.calls}
    blocks = tuple(Block(p.name, p.weight_bytes, p.load_s) for own in parts.values() for p in own if p.name in called)
    return Run(blocks, tuple(phases))


def _kept_bytes(round_: Round, names: Sequence[str], place: int) -> int:
    """What is held at the call in that place of a round for ranges that steps reuse."""
    return sum(k.before_bytes if place < names.index(k.first) else k.then_bytes for k in round_.kept)


def retimed(run: Run, structures: Mapping[str, str], measured: TimesFile) -> Run:
    """The run with measured times; ``structures`` are by ``COMPONENT/BLOCK``.

    Raises:
        BundleError: a block's structure or function was not measured; names the file, and the bundle that it is of.
    """
    times = measured.times

    def missing(block: str, what: str) -> BundleError:
        return BundleError(
            f"--calibration {measured.path}: is a calibration of another bundle ('{times.bundle}'): it has no times of "
            f"{what} of '{block}'; calibrate this one"
        )

    def load_s(block: str) -> float:
        found = times.structures.get(structures[block])
        if found is None:
            raise missing(block, f"the structure {structures[block][:8]}")
        return found.load_s

    def compute_s(call: Call) -> float:
        load_s(call.block)
        run_s = times.structures[structures[call.block]].run_s
        if call.function not in run_s:
            raise missing(call.block, f"function '{call.function}'")
        return run_s[call.function]

    blocks = tuple(replace(b, load_s=load_s(b.name)) for b in run.blocks)
    phases = (replace(p, calls=tuple(replace(c, compute_s=compute_s(c)) for c in p.calls)) for p in run.phases)
    return Run(blocks, tuple(phases))
