"""Steps that compute less: a range of blocks that is left out, and guidance without its unconditional half.

A transformer's blocks change less from step to step than what goes into them. A step that *reuses* a range leaves its
blocks out: what comes out of the range is what goes in now, and the residual (out - in) that the range added at the
last step that computed it. A *conditional* step leaves out the unconditional half, whose difference to the other
changes little. Source: see docs/techniques.md. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from toolchain.errors import RecipeError
from toolchain.formats.schedule import Guidance

Difference = Literal["none", "last"]
"""What stands for c - u at a conditional step: nothing, or that of the last step that computed both halves."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _once(steps: list[int]) -> list[int]:
    twice = next((i for n, i in enumerate(steps) if i in steps[:n]), None)
    if twice is not None:
        raise ValueError(f"step {twice} is listed twice")
    return sorted(steps)


Places = Annotated[list[int], Field(min_length=1), AfterValidator(_once)]
"""Steps, which count from 0."""


class Accumulated(_Strict):
    """Leave a range out until what goes on before it has changed enough. Every number of the rule is here.

    The rule, for step index i = 0, 1, … of n (executed by :class:`toolchain.player.accumulated.AccumulatedState`):

    1. x_i is a value that is computed before the range, at every step. Its change is the mean of |x_i - x_{i-1}| over
       the mean of |x_{i-1}|; of values of different batch the first rows are compared, as many as both have.
    2. The polynomial of the change is added to a sum, which starts at 0.
    3. Where i < ``first``, i >= n - ``last``, or the sum is not below ``threshold`` (not a number included), the range
       is computed, and the sum is 0 again. Else it is left out.
    """

    kind: Literal["accumulated"] = "accumulated"
    threshold: float = Field(gt=0, description="The sum of changes from which on the range is computed.")
    polynomial: list[float] = Field(
        default=[1.0, 0.0], min_length=1, description="Coefficients, of the highest power first."
    )
    first: int = Field(default=1, ge=1, description="How many of the first steps compute the range always.")
    last: int = Field(default=1, ge=0, description="How many of the last ones do.")

    def may_leave_out(self, index: int, steps: int) -> bool:
        """Whether the rule may ever leave the range out at a step."""
        return self.first <= index < steps - self.last

    def kept_after(self, steps: int) -> list[bool]:
        """By step, whether the next one may want what the range added."""
        return [self.may_leave_out(i + 1, steps) for i in range(steps)]

    def check(self, steps: Sequence[Reusing]) -> None:
        """Refuse steps of which the rule can save none, or which could not take what is kept.

        Raises:
            RecipeError: says why.
        """
        count = len(steps)
        if self.first + self.last >= count:
            raise RecipeError(
                f"reuse.rule: the first {self.first} and the last {self.last} of {count} denoiser calls compute all, "
                "so that none is left; lower 'first' or 'last', or leave 'reuse' out"
            )
        for i, (before, step) in enumerate(pairwise(steps), 1):
            if before.guidance == "conditional" and step.guidance == "both" and i < count - self.last:
                raise RecipeError(
                    f"reuse.rule: step {i} computes both halves of guidance after a step that computes the conditional "
                    "half alone, and could not take what is kept of that; make all steps from one on conditional"
                )


class Reuse(_Strict):
    """Steps that leave out a range of blocks, and take what it added at the last step that computed it.

    Which these are is said by ``steps``, or decided by ``rule`` while a video is made.
    """

    steps: Places | None = Field(default=None, description="The steps, which count from 0.")
    rule: Accumulated | None = Field(default=None, description="A rule that chooses them instead.")
    observes: str | None = Field(
        default=None,
        description="The value that the rule observes, as BLOCK.OUTPUT; what goes into the range if absent.",
    )
    blocks: list[str] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="First and last block of the range; the longest range that there is if absent.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Reuse:
        if (self.steps is None) == (self.rule is None):
            raise ValueError("give the steps that reuse, or a rule that chooses them")
        if self.observes is not None and self.rule is None:
            raise ValueError("observes: steps that are listed observe nothing; give a rule, or leave it out")
        return self


class Conditional(_Strict):
    """Steps that compute the conditional half alone: v = c, or v = c + (guidance - 1) · d.

    ``difference: last`` takes d = c - u of the last step that computed both halves.
    """

    steps: Places = Field(description="The steps, which count from 0.")
    difference: Difference = Field(default="none", description="What stands for the difference of the halves.")


class Reusing(Protocol):
    """A step, as far as it is asked about here."""

    @property
    def guidance(self) -> Guidance: ...

    @property
    def reuse(self) -> str | None: ...


Blocks = Mapping[str, Collection[str]]
"""The blocks of each range, by its name."""


def computes(step: Reusing, name: str, ranges: Blocks) -> bool:
    """Whether a step computes all of a range."""
    return step.reuse is None or set(ranges[step.reuse]).isdisjoint(ranges[name])


def check_reuse(steps: Sequence[Reusing], ranges: Blocks, difference: Difference) -> None:
    """Refuse steps that need what no earlier step computed.

    Raises:
        RecipeError: names the step, which counts from 0.
    """
    computed: dict[str, Guidance] = {}
    both = False
    for i, step in enumerate(steps):
        name = step.reuse
        if name is not None and name not in computed:
            raise RecipeError(f"reuse.steps: no step before step {i} computes all of '{name}', which it is to reuse")
        if name is not None and step.guidance == "both" and computed[name] == "conditional":
            raise RecipeError(
                f"reuse.steps: step {i} computes both halves of guidance, but the last step that computed '{name}' "
                "the conditional half alone; make it conditional, too, or leave it out"
            )
        if step.guidance == "conditional" and difference == "last" and not both:
            raise RecipeError(
                f"conditional.difference: no step before step {i} computes both halves, so there is no last difference"
            )
        both = both or step.guidance == "both"
        computed |= {r: step.guidance for r in ranges if computes(step, r, ranges)}


def kept_after(steps: Sequence[Reusing], ranges: Blocks) -> dict[str, list[bool]]:
    """By range and step, whether what the range added is needed after the step."""
    found: dict[str, list[bool]] = {}
    for name in ranges:
        needed = False
        backwards = []
        for step in reversed(steps):
            backwards.append(needed)
            needed = step.reuse == name or (needed and not computes(step, name, ranges))
        found[name] = backwards[::-1]
    return found
