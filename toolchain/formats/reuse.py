"""Steps that compute less: a range of blocks that is left out, and guidance without its unconditional half.

A transformer's blocks change less from step to step than what goes into them. A step that *reuses* a range leaves its
blocks out: what comes out of the range is what goes in now, and the residual (out - in) that the range added at the
last step that computed it. A *conditional* step leaves out the unconditional half, whose difference to the other
changes little. Source: see docs/techniques.md. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from toolchain.errors import RecipeError
from toolchain.formats.schedule import Guidance

Difference = Literal["none", "last"]
"""What stands for c - u at a conditional step: nothing, or that of the last step that computed both halves."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Places(_Strict):
    steps: list[int] = Field(min_length=1, description="The steps, which count from 0.")

    @field_validator("steps")
    @classmethod
    def _once(cls, steps: list[int]) -> list[int]:
        twice = next((i for n, i in enumerate(steps) if i in steps[:n]), None)
        if twice is not None:
            raise ValueError(f"step {twice} is listed twice")
        return sorted(steps)


class Reuse(_Places):
    """Steps that leave out a range of blocks, and take what it added at the last step that computed it."""

    blocks: list[str] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="First and last block of the range; the longest range that there is if absent.",
    )


class Conditional(_Places):
    """Steps that compute the conditional half alone: v = c, or v = c + (guidance - 1) · d.

    ``difference: last`` takes d = c - u of the last step that computed both halves.
    """

    difference: Difference = "none"


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
