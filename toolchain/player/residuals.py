"""What ranges of a denoiser's blocks added, kept from a step that computed them for those that leave them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from toolchain.formats.reuse import kept_after
from toolchain.formats.sampling import RangeEntry, RuleEntry, SamplerEntry
from toolchain.player.accumulated import AccumulatedState


@dataclass(frozen=True)
class StepRanges:
    """What a step does about ranges: which one it reuses, and of which it keeps what they add.

    With ``leaves_out``, which is asked when the value ``observed`` is there, ``reused`` is reused if it says so.
    """

    reused: RangeEntry | None = None
    computed: Sequence[RangeEntry] = ()
    dropped: Sequence[RangeEntry] = ()
    """What these added is not needed once the step is done."""
    observed: str | None = None
    leaves_out: Callable[[torch.Tensor], bool] | None = None


NO_RANGES = StepRanges()


def step_ranges(sampler: SamplerEntry, leave_out: Callable[[RangeEntry], None]) -> list[StepRanges]:
    """What every step of a sampler does about ranges; for one video.

    Args:
        leave_out: is told of a range that a rule leaves out.
    """
    if sampler.rule is not None:
        return _ruled(sampler, sampler.rule, leave_out)
    kept = kept_after(sampler.steps, {name: own.blocks for name, own in sampler.ranges.items()})
    found = []
    for i, step in enumerate(sampler.steps):
        reused = sampler.ranges[step.reuse] if step.reuse is not None else None
        left_out = set(reused.blocks) if reused is not None else set()
        found.append(
            StepRanges(
                reused,
                [r for n, r in sampler.ranges.items() if kept[n][i] and left_out.isdisjoint(r.blocks)],
                [r for n, r in sampler.ranges.items() if not kept[n][i]],
            )
        )
    return found


def _ruled(sampler: SamplerEntry, rule: RuleEntry, leave_out: Callable[[RangeEntry], None]) -> list[StepRanges]:
    own, count = sampler.ranges[rule.range], len(sampler.steps)
    state = AccumulatedState(rule, count)

    def asked(step: int) -> Callable[[torch.Tensor], bool]:
        def leaves_out(value: torch.Tensor) -> bool:
            found = state.leaves_out(step, value)
            if found:
                leave_out(own)
            return found

        return leaves_out

    return [
        StepRanges(own, [own] if kept else [], [] if kept else [own], rule.observes, asked(step))
        for step, kept in enumerate(rule.kept_after(count))
    ]


class Residuals:
    """``out - in`` of ranges ``[B, …]``, by their first and last blocks. Make a new one for every video."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], torch.Tensor] = {}

    def keep(self, own: RangeEntry, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Keep what a range added in the step that is being made, in ``dtype``."""
        self._kept[_ends(own)] = (values[own.output].float() - values[own.input].float()).to(dtype)

    def applied(self, own: RangeEntry, goes_in: torch.Tensor) -> torch.Tensor:
        """What comes out of a range that is left out: ``goes_in`` and what the range added last.

        Of what both halves of guidance added, the conditional half takes the first.
        """
        added = self._kept[_ends(own)][: goes_in.shape[0]]
        return (goes_in.float() + added.float()).to(goes_in.dtype)

    def drop(self, own: RangeEntry) -> None:
        """Forget what a range added, if anything is kept of it."""
        self._kept.pop(_ends(own), None)


def _ends(own: RangeEntry) -> tuple[str, str]:
    return own.blocks[0], own.blocks[-1]
