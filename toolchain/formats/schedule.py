"""When the denoiser is called, and with which function: steps as data, and the leap that ends sampling early (LPL).

What a step may leave out (blocks, or half of the guidance) is in :mod:`toolchain.formats.reuse`.

A ``t`` counts from 1000 (noise) down to 0 (video). Nothing here needs torch.

Source: On-device Sora (arXiv 2502.04363) for LPL and TDTM.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from toolchain.errors import RecipeError
from toolchain.ir.functions import conditional, grouped
from toolchain.ir.rounding import float32

NUM_TRAIN_TIMESTEPS: Final = 1000
BASE: Final = "base"
"""The function that every block has."""
MERGED: Final = "merged"
"""The function that a recipe's ``merged_steps`` ask for."""
Guidance = Literal["both", "conditional"]
"""What a call of the denoiser computes: with the prompt and without it, or with it alone."""


class StaticLeap(BaseModel):
    """Leap after ``after`` ordinary steps, with the next velocity: ``after + 1`` denoiser calls.

    LPL with a fixed n: z = z_n + v_{n+1}·t_{n+1}. The published app uses 15 of 30.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: Literal["static"] = "static"
    after: int = Field(ge=1, description="Ordinary steps before the leap.")

    def check(self, steps: int) -> None:
        """Raises RecipeError unless the leap comes before the last of ``steps``."""
        if not 1 <= self.after < steps:
            choice = f"choose 1 to {steps - 1}" if steps > 1 else "leave the leap out"
            raise RecipeError(f"leap.after is {self.after}, but there are {steps} steps; {choice}")

    def resolve(self, steps: int) -> StaticLeap:
        """Itself: it already says all that a device needs."""
        return self


class DynamicLeap(BaseModel):
    """Leap when consecutive velocities have stopped becoming more alike. Every number of the rule is here.

    The rule, for step index i = 0, 1, … (executed by :class:`toolchain.player.leap.LeapState`):

    1. v_i is the velocity after guidance, ``[C, T, H, W]``; cos_i compares ``region`` of v_i and v_{i-1}.
    2. Nothing is judged before i = max(1, start, ⌈start_fraction · steps⌉).
    3. cos_i > best + min_gain (float32) is a gain: best = cos_i, and the failures are forgotten if
       ``reset_on_gain``. Anything else, not-a-number included, is a failure.
    4. At the ``patience``-th failure this step leaps: z + v_i · t_i / 1000 is the result.

    ``best`` starts at ``initial_best``. Cosines are x·y / (max(|x|, eps) · max(|y|, eps)).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["dynamic"] = "dynamic"
    start: int = Field(default=0, ge=0, description="No step before this index is judged.")
    start_fraction: float = Field(default=0.0, ge=0.0, le=1.0, description="The same as a share of the steps.")
    patience: int = Field(ge=1, description="The failure at which a step leaps.")
    min_gain: float = Field(ge=0.0, description="By how much a cosine must be over the best to be a gain.")
    reset_on_gain: bool = Field(description="Whether a gain clears the failures.")
    initial_best: float = Field(description="The best cosine before the first.")
    region: Literal["first_frame_rows", "whole"] = Field(
        description="first_frame_rows: channel 0, frame 0, mean over H of the cosines along W; whole: all of v, flat."
    )
    eps: float = Field(default=1e-8, gt=0.0, description="Least norm that a cosine divides by.")

    def first_judged(self, steps: int) -> int:
        """Index of the first step that rule 2 lets judge; ``steps`` or more if none."""
        return max(1, self.start, math.ceil(self.start_fraction * steps))

    def check(self, steps: int) -> None:
        """Raises RecipeError if the rule cannot save a single one of ``steps``."""
        # A best below every cosine makes the first one judged a gain, whatever it is.
        first_is_gain = self.initial_best + self.min_gain < -1.0
        earliest = self.first_judged(steps) + self.patience - (0 if first_is_gain else 1)
        if earliest >= steps - 1:
            raise RecipeError(
                f"leap could come at step index {earliest} at the earliest, but the last of {steps} steps "
                f"is {steps - 1}; lower leap.start or leap.patience, or leave the leap out"
            )

    def resolve(self, steps: int) -> DynamicLeap:
        """The same rule with ``start`` as a number and no fraction: what a manifest records."""
        return self.model_copy(update={"start": self.first_judged(steps), "start_fraction": 0.0})


Leap = Annotated[StaticLeap | DynamicLeap, Field(discriminator="kind")]

PRESETS: Final[Mapping[str, DynamicLeap]] = MappingProxyType(
    {
        # The paper's text: from half of the steps on, until a set number of cosines did not improve the best
        # by more than 1e-4. It leaves open, and we assume: the number is 3, as in the code; failures add up
        # (a gain does not clear them); the first cosine judged is the first best; the cosine is of the whole
        # velocity, all channels, frames and pixels as one vector.
        "paper": DynamicLeap(
            start_fraction=0.5, patience=3, min_gain=1e-4, reset_on_gain=False, initial_best=-2.0, region="whole"
        ),
        # The published GPU sampler, save that the state is new for every sample.
        "code": DynamicLeap(
            start=14, patience=3, min_gain=1e-3, reset_on_gain=True, initial_best=0.0, region="first_frame_rows"
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Step:
    """One denoiser call at ``t`` (0 … 1000), then z ← z + v·``dt`` (``dt`` in units of 1000 t, float32)."""

    index: int
    t: float
    dt: float
    function: str = BASE
    """What the denoiser's blocks are asked for; those that lack it run their default function."""
    leap: bool = False
    """This step goes all the way to t = 0 and is the last."""
    guidance: Guidance = "both"
    reuse: str | None = None
    """Name of a range of blocks that are left out; what the range added last stands for them."""

    def leaping(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Step:
        """The same call followed by the leap: dt = t / 1000 (LPL: z = z_n + v(z_n, t)·t)."""
        return replace(self, dt=float32(self.t / num_train_timesteps), leap=True)


def plan_steps(
    timesteps: Sequence[float],
    leap: StaticLeap | DynamicLeap | None = None,
    *,
    merged_steps: int = 0,
    conditional_steps: Collection[int] = (),
    reuse: Mapping[str, Collection[int]] = MappingProxyType({}),
    groups: int = 1,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> tuple[Step, ...]:
    """The denoiser calls of a run: dt_i = (t_i - t_{i+1}) / 1000, the last one's t / 1000.

    The first ``merged_steps`` of them ask for the function :data:`MERGED` (TDTM), those at the places
    ``conditional_steps`` for that of the conditional half (:func:`toolchain.ir.functions.conditional`), and those at
    the places in ``reuse`` leave out the range that is named there. A step asks for its function as it is there for its
    group (:func:`groups_of`, :func:`toolchain.ir.functions.grouped`). Whether what is reused was computed is checked by
    :func:`toolchain.formats.reuse.check_reuse`.

    A static leap cuts the list short. A dynamic one is decided while sampling, so the list is whole: the
    step for which the rule says so is replaced by its :meth:`Step.leaping` and is the last.

    Raises:
        RecipeError: there are no timesteps, a static leap does not lie within them, there are fewer than
            ``merged_steps`` or ``groups``, a place is of no step, or a step reuses two ranges.
    """
    if not timesteps:
        raise RecipeError("there are no timesteps; steps must be at least 1")
    if not 0 <= merged_steps <= len(timesteps):
        raise RecipeError(f"merged_steps is {merged_steps}; choose 0 to {len(timesteps)}, the number of steps")
    ends = (*timesteps[1:], 0.0)
    steps = [
        Step(i, float(t), float32(float32(t - end) / num_train_timesteps), MERGED if i < merged_steps else BASE)
        for i, (t, end) in enumerate(zip(timesteps, ends, strict=True))
    ]
    if isinstance(leap, StaticLeap):
        leap.check(len(steps))
        steps = [*steps[: leap.after], steps[leap.after].leaping(num_train_timesteps)]
    for i in _places("conditional", conditional_steps, len(steps)):
        steps[i] = replace(steps[i], function=conditional(steps[i].function), guidance="conditional")
    for name, asked in reuse.items():
        for i in _places("reuse", asked, len(steps)):
            if steps[i].reuse is not None:
                raise RecipeError(f"reuse.steps: step {i} is in two lists; a step reuses one range of blocks")
            steps[i] = replace(steps[i], reuse=name)
    places = enumerate(groups_of(steps, groups))
    return tuple(replace(step, function=grouped(step.function, k)) for k, own in places for step in own)


def _places(key: str, asked: Iterable[int], count: int) -> Iterable[int]:
    for i in asked:
        if not 0 <= i < count:
            raise RecipeError(f"{key}.steps: there is no step {i}; of {count} denoiser calls, choose 0 to {count - 1}")
        yield i


def groups_of(steps: Sequence[Step], groups: int) -> list[Sequence[Step]]:
    """Steps divided into stretches of equal length; the first ones have one more where they do not come out even.

    Raises:
        RecipeError: there are fewer steps than groups.
    """
    if not 1 <= groups <= len(steps):
        raise RecipeError(f"groups of steps: {groups} of {len(steps)} denoiser calls; choose 1 to {len(steps)}")
    ends = [len(steps) // groups * k + min(k, len(steps) % groups) for k in range(groups + 1)]
    return [steps[a:b] for a, b in pairwise(ends)]
