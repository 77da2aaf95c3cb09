"""A recipe's sampler, resolved: the calls of the denoiser, and the ranges of blocks that they reuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolchain.errors import RecipeError
from toolchain.formats.calls import StepCalls, step_calls
from toolchain.formats.recipe import Recipe
from toolchain.formats.reuse import Accumulated, check_reuse, computes
from toolchain.formats.sampling import RangeEntry, RuleEntry
from toolchain.formats.schedule import Step, plan_steps
from toolchain.models.family import ModelFamily
from toolchain.planning.ranges import Range


@dataclass(frozen=True)
class Sampling:
    """``ranges`` are by name; each is reused by one step or more, or by those that the ``rule`` chooses."""

    steps: tuple[Step, ...]
    ranges: Mapping[str, Range]
    rule: RuleEntry | None = None

    def entries(self) -> dict[str, RangeEntry]:
        """The ranges as a manifest has them."""
        own = {name: r.blocks for name, r in self.ranges.items()}
        computing = {name: [s.function for s in self.steps if computes(s, name, own)] for name in own}
        return {
            name: RangeEntry(
                blocks=list(r.blocks),
                input=r.input,
                output=r.output,
                bytes=max(r.bytes[f] for f in computing[name]),
            )
            for name, r in self.ranges.items()
        }

    def calls(self, difference_bytes: int) -> Iterator[StepCalls]:
        """What each step calls, and keeps for others; arguments as for :func:`step_calls`."""
        return step_calls(self.steps, self.entries(), self.rule, difference_bytes)


def sampling(recipe: Recipe, family: ModelFamily, groups: int = 1, ranges: Sequence[Range] = ()) -> Sampling:
    """The sampler of a recipe.

    Args:
        groups: how many groups the steps are divided into.
        ranges: of each entry of ``sampler.reuse``, as :func:`toolchain.planning.ranges.find_ranges` finds them.

    Raises:
        RecipeError: there are fewer steps than groups, or a step needs what no earlier one computed.
    """
    own = recipe.sampler
    steps = plan_steps(
        family.timesteps(recipe),
        own.leap,
        merged_steps=own.merged_steps,
        conditional_steps=own.conditional_steps,
        reuse={r.name: asked.steps or () for r, asked in zip(ranges, own.reuse, strict=True)},
        groups=groups,
    )
    by_name = {r.name: r for r in ranges}
    try:
        ruled = [(asked.rule, r) for r, asked in zip(ranges, own.reuse, strict=True) if asked.rule is not None]
        rule = _rule(*ruled[0], steps) if ruled else None
        check_reuse(steps, {name: r.blocks for name, r in by_name.items()}, own.difference)
    except RecipeError as e:
        raise RecipeError(f"sampler.{e}") from e
    return Sampling(steps, by_name, rule)


def _rule(rule: Accumulated, own: Range, steps: Sequence[Step]) -> RuleEntry:
    rule.check(steps)
    assert own.observed is not None  # every range of an entry with a rule has it
    bytes_ = max(own.observed.bytes[s.function] for s in steps)
    return RuleEntry(**rule.model_dump(), range=own.name, observes=own.observed.source, bytes=bytes_)
