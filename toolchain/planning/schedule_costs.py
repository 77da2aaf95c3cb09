"""How long schedules of a recipe take on its device, as the planner predicts: as a whole, and by kinds of steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from toolchain.formats.recipe import SamplerRecipe
from toolchain.formats.reuse import Conditional, Difference, Reuse
from toolchain.formats.schedule import StaticLeap
from toolchain.planning.loading.predict import Predicted
from toolchain.planning.plan import Plan
from toolchain.planning.step_search import Mode

UNITS_PER_S: Final = 1_000_000
"""Costs of steps are whole microseconds."""


def as_sampler(
    base: SamplerRecipe, modes: tuple[Mode, ...], difference: Difference, blocks: list[str] | None
) -> SamplerRecipe:
    """A sampler whose steps do what ``modes`` say, and else what ``base`` does.

    Args:
        blocks: first and last of the range that is reused; the longest range that there is if None.
    """
    reused = [i for i, mode in enumerate(modes) if mode.startswith("reuse")]
    alone = [i for i, mode in enumerate(modes) if mode.endswith("conditional")]
    found = base.model_copy(
        update={
            "reuse": [Reuse(steps=reused, blocks=blocks)] if reused else [],
            "conditional": Conditional(steps=alone, difference=difference) if alone else None,
        }
    )
    return SamplerRecipe.model_validate(found.model_dump())


def schedule_name(sampler: SamplerRecipe) -> str:
    """A schedule in a few words, such as "30 steps, 14 reuse, leap after 20"."""
    reused = sum(len(r.steps or ()) for r in sampler.reuse)
    parts = [f"{sampler.steps} steps"]
    parts += [f"{sampler.merged_steps} merged"] if sampler.merged_steps else []
    parts += [f"{reused} reuse"] if reused else []
    parts += ["reuse by a rule"] if any(r.rule is not None for r in sampler.reuse) else []
    parts += [f"{len(sampler.conditional_steps)} conditional"] if sampler.conditional_steps else []
    if isinstance(sampler.leap, StaticLeap):
        parts += [f"leap after {sampler.leap.after}"]
    elif sampler.leap is not None:
        parts += ["leap by a rule"]
    return ", ".join(parts)


class ScheduleCosts:
    """Predictions for schedules of a planned recipe, whose blocks are planned once."""

    def __init__(self, planned: Plan, blocks: list[str] | None) -> None:
        self._planned, self._blocks = planned, blocks
        self._known: dict[str, Predicted] = {}

    def predicted(self, sampler: SamplerRecipe) -> Predicted:
        """The video under another sampler.

        Raises:
            RecipeError: it does not fit into the memory budget, or asks for what the model does not have.
        """
        key = sampler.model_dump_json()
        if key not in self._known:
            recipe = self._planned.recipe.model_copy(update={"sampler": sampler})
            resolved = replace(self._planned.resolved, recipe=recipe)
            self._known[key] = replace(self._planned, resolved=resolved).loading
        return self._known[key]

    def seconds(self, sampler: SamplerRecipe) -> float:
        """How long the video takes, text encoder and decoding included; raises as :meth:`predicted`."""
        return self.predicted(sampler).timeline.total_s

    def of_steps(self, base: SamplerRecipe, modes: Collection[Mode], calls: int) -> list[dict[Mode, int]]:
        """What each of ``calls`` steps costs by mode; all of them in full come to what ``base`` takes.

        Taken from videos in which every second step has the mode: what is loaded meanwhile is counted as it then is.
        """
        total = self.seconds(base)
        saved = {merged: self._saved(base, modes, merged) for merged in {i < base.merged_steps for i in range(calls)}}
        return [
            {m: round((total / calls - s) * UNITS_PER_S) for m, s in saved[i < base.merged_steps].items()}
            for i in range(calls)
        ]

    def _saved(self, base: SamplerRecipe, modes: Collection[Mode], merged: bool) -> Mapping[Mode, float]:
        """Seconds that a step saves, by mode, at steps that are merged or not."""
        steps = max(base.steps, 3)
        whole = base.model_copy(update={"leap": None, "steps": steps, "merged_steps": steps if merged else 0})
        places = range(1, steps, 2)
        found: dict[Mode, float] = {"both": 0.0}
        for mode in modes:
            own = tuple(mode if i in places else "both" for i in range(steps))
            if mode != "both":
                sampler = as_sampler(whole, own, "none", self._blocks)
                found[mode] = (self.seconds(whole) - self.seconds(sampler)) / len(places)
        return found
