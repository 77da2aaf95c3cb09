"""Which steps compute what, searched for: errors of steps are measured, schedules found by them, and tried.

The schedules that are tried come from the exact search of :mod:`toolchain.planning.step_search`, on a few bases (fewer
steps, the recipe's leap and merged steps). Its sums of errors are estimates: what counts is what is measured on whole
videos. Times are the planner's, so that nothing depends on the machine that searches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolchain.accuracy.confidence import lower_bound
from toolchain.accuracy.step_errors import calls_to_measure
from toolchain.build.tuning_runs import TuningRuns, TuningVideo
from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.formats.reuse import Difference
from toolchain.formats.schedule import BASE, MERGED, StaticLeap
from toolchain.ir.functions import conditional
from toolchain.listener import Listener
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.planning.schedule_costs import UNITS_PER_S, ScheduleCosts, as_sampler, schedule_name
from toolchain.planning.step_search import Found, Mode, Objective, search
from toolchain.system.store import Store

GOLDEN_VIDEOS: Final = 4
"""How many videos of the golden prompt are made where no other prompts are given."""
SHARES: Final = (1.0, 2 / 3, 0.5)
"""Bases have so many of the recipe's steps."""
MARGIN_DB: Final = 3.0
"""What one video says may be so far from what all say."""
BETWEEN: Final = 3
"""How many more schedules are looked for about a goal."""
CONFIDENCE: Final = 0.9
"""Of what is promised."""


@dataclass(frozen=True)
class Tried:
    """A schedule: what the planner predicts of the whole video, and how near it comes to the full schedule's videos.

    ``psnr_db`` is the mean over the tuning videos, ``worst_db`` the least; that of the full schedule itself is 200.
    ``promised_db`` is what the mean over videos of other prompts like these is at least, with a confidence of
    :data:`CONFIDENCE`; -inf where there is one video alone, which says nothing of others.
    """

    sampler: SamplerRecipe
    seconds: float
    peak_bytes: int
    psnr_db: float
    worst_db: float
    promised_db: float


@dataclass(frozen=True)
class Tuned:
    """What a search found. ``front`` has the best schedule for every time, the full one first and the fastest last.

    ``own`` is the recipe's schedule as it was. ``recipe`` has the ``chosen`` one; where no goal was given, none is.
    """

    recipe: Recipe
    full: Tried
    own: Tried
    front: tuple[Tried, ...]
    chosen: Tried | None
    videos: tuple[TuningVideo, ...]


def tune(
    recipe: Recipe,
    *,
    base: str | Path | None = None,
    latency_s: float | None = None,
    quality_db: float | None = None,
    memory_bytes: int | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    points: int = 12,
    listener: Listener | None = None,
    store: Store | None = None,
) -> Tuned:
    """Search for the recipe's best schedules, and choose the one that a goal asks for.

    The models are loaded whole, in float32. What was measured before is taken from the store; the same arguments give
    the same result. All is done in this process, one video after the other.

    Args:
        base: folder that relative checkpoint paths are looked for in first.
        latency_s: choose the schedule nearest to the full one that is predicted to take at most so long.
        quality_db: choose the fastest one that promises at least this PSNR against the full schedule's videos.
        memory_bytes: predict for this memory budget instead of the recipe's.
        prompts: what is tried; the n-th has seed + n. The golden video's prompt, four times, if None.
        points: how many times, from the fastest schedule's to the full one's, schedules are looked for at.
        listener: is told of progress, and beforehand of the calls that measuring takes.
        store: where results are kept; the user's cache folder if None.

    Raises:
        RecipeError: no schedule meets the goal, and says what can be met; the recipe has no range of blocks to reuse,
            or lacks a component; or there are no prompts.
    """
    where, store, listener = Path(base or "."), store or Store(), listener or Listener()
    if latency_s is not None and quality_db is not None:
        raise RecipeError("--latency and --quality: choose one")
    videos = _videos(recipe, prompts, seed)
    if quality_db is not None and len(videos) < 2:
        raise RecipeError(
            "--quality: one video does not say what is to be expected of others; give two prompts or more"
        )
    if points < 1:
        raise RecipeError(f"--points {points}: must be at least 1")
    given = {} if memory_bytes is None else {"memory_budget": memory_bytes}
    recipe = recipe.model_copy(update=given)
    found = _Tuning(recipe, where, videos, points, listener, store)
    front = found.front(latency_s, quality_db)
    chosen = choose(front, latency_s, quality_db)
    store.evict()
    with_it = recipe if chosen is None else recipe.model_copy(update={"sampler": chosen.sampler})
    return Tuned(with_it, found.tried(found.full), found.tried(recipe.sampler), front, chosen, found.videos)


def _videos(recipe: Recipe, prompts: Sequence[str] | None, seed: int) -> tuple[TuningVideo, ...]:
    if prompts is None:
        golden = recipe.gate.golden
        if golden is None:
            raise RecipeError(
                "tune: there is nothing to try schedules on; give --prompts, or gate.golden in the recipe"
            )
        prompts = [golden.prompt] * GOLDEN_VIDEOS
    if not prompts:
        raise RecipeError("tune: there are no prompts; give one or more, a line each")
    return tuple(TuningVideo(prompt, seed + i) for i, prompt in enumerate(prompts))


def choose(front: Sequence[Tried], latency_s: float | None, quality_db: float | None) -> Tried | None:
    """What a goal asks for of a front, the slowest first; None if there is no goal.

    Raises:
        RecipeError: nothing meets it; says what comes nearest.
    """
    if latency_s is not None:
        if fits := [t for t in front if t.seconds <= latency_s]:
            return fits[0]
        least = front[-1]
        raise RecipeError(
            f"--latency {latency_s:g}: cannot be met: {least.seconds:.4g} s is the fastest schedule found, at "
            f"{least.psnr_db:.2f} dB; give more time, or a device that is faster"
        )
    if quality_db is not None:
        if fits := [t for t in front if t.promised_db >= quality_db]:
            return fits[-1]
        raise RecipeError(
            f"--quality {quality_db:g}: cannot be met: {front[0].psnr_db:g} dB is what the full schedule is given"
        )
    return None


@dataclass(frozen=True)
class _Base:
    """A sampler that leaves nothing out, its number of calls, what its steps may do, and the fronts found for it."""

    sampler: SamplerRecipe
    calls: int
    modes: tuple[Mode, ...]
    fronts: tuple[tuple[Difference, list[Found]], ...] = ()


class _Tuning:
    """A search: its bases, and all that was tried."""

    def __init__(
        self,
        recipe: Recipe,
        where: Path,
        videos: tuple[TuningVideo, ...],
        points: int,
        listener: Listener,
        store: Store,
    ) -> None:
        own = recipe.sampler
        off: dict[str, Any] = {"leap": None, "merged_steps": 0, "reuse": [], "conditional": None}
        self.full = own.model_copy(update=off)
        self.videos, self._points, self._listener = videos, points, listener
        self._blocks = own.reuse[0].blocks if own.reuse else None
        build = resolve(recipe.model_copy(update={"sampler": self.full}), where, checkpoints=True)
        planned = plan_resolved(build)
        self._costs = ScheduleCosts(planned, self._blocks)
        self._costs.predicted(self.full)  # what does not fit is refused before anything is made
        self._runs = TuningRuns(build, self.full, self._blocks, videos, store)
        provided = build.components["transformer"].passes.provides
        self._bases = tuple(_bases(own, self.full, provided))

    def tried(self, sampler: SamplerRecipe) -> Tried:
        """A schedule on all tuning videos."""
        each = [self._runs.psnr_db(sampler, i) for i in range(len(self.videos))]
        timeline = self._costs.predicted(sampler).timeline
        promised = lower_bound(each, CONFIDENCE) if len(each) > 1 else -math.inf
        return Tried(sampler, timeline.total_s, timeline.peak_bytes, sum(each) / len(each), min(each), promised)

    def front(self, latency_s: float | None, quality_db: float | None) -> tuple[Tried, ...]:
        """The best schedules of those that are looked at, the full one first."""
        self._announce()
        self._listener.start("steps", [schedule_name(b.sampler) for b in self._bases])
        bases = [self._searched(base) for base in self._bases]
        dearest = self._costs.seconds(self.full)
        least = min(found[-1].cost for b in bases for _, found in b.fronts) / UNITS_PER_S
        levels = [dearest - (dearest - least) * k / self._points for k in range(1, self._points + 1)]
        if latency_s is not None:  # sums of steps are not quite what the planner says of the whole
            levels += [latency_s * (1 - 0.01 * k) for k in range(BETWEEN)]
        front = self._looked(bases, levels)
        chosen = choose(front, None, quality_db)
        if chosen is not None and chosen != front[-1]:
            faster = front[front.index(chosen) + 1].seconds
            span = chosen.seconds - faster
            between = [faster + span * k / (BETWEEN + 1) for k in range(1, BETWEEN + 1)]
            front = self._looked(bases, [*levels, *between])
        return front

    def _announce(self) -> None:
        """Say beforehand what measuring the steps takes; trying schedules takes more the more videos there are."""
        numbers = self._runs.step_videos
        missing = [b for b in self._bases for i in numbers if not self._runs.knows_steps(b.sampler, i)]
        if missing:
            calls, short = sum(calls_to_measure(b.calls) for b in missing), sum(b.calls**2 // 2 for b in missing)
            minutes = calls * self._runs.call_seconds() / 60
            self._listener.remark(
                f"{len(numbers)} videos: measuring the steps takes {calls} calls of the denoiser, about "
                f"{minutes:.1f} minutes here, and {short} without its blocks; trying schedules at least as much again"
            )

    def _searched(self, base: _Base) -> _Base:
        """The base with the fronts that its steps' errors give."""
        self._listener.working("steps", schedule_name(base.sampler), "measure")
        measured = self._runs.steps(base.sampler)
        costs = self._costs.of_steps(base.sampler, base.modes, base.calls)
        differences: tuple[Difference, ...] = ("none", "last") if "conditional" in base.modes else ("none",)
        kinds: tuple[tuple[bool, Objective], ...] = ((True, "sum"), (False, "sum"), (True, "largest"))
        fronts = tuple(
            (d, search(measured.at_the_end if grown else measured.errors, costs, d, modes=base.modes, objective=o))
            for d in differences
            for grown, o in kinds
        )
        self._listener.finished("steps", schedule_name(base.sampler), None)
        return _Base(base.sampler, base.calls, base.modes, fronts)

    def _looked(self, bases: Sequence[_Base], levels: Sequence[float]) -> tuple[Tried, ...]:
        """The front of what there is at these times: looked at on the first video, and what is near the best on all."""
        seen: dict[str, tuple[SamplerRecipe, float, float]] = {}

        def beaten(seconds: float, db: float) -> bool:
            return any(s <= seconds and d >= db for _, s, d in seen.values())

        self._listener.start("first video", [schedule_name(b.sampler) for b in bases])
        for base in bases:
            self._listener.working("first video", schedule_name(base.sampler), "try")
            most = self._runs.psnr_db(base.sampler, 0)
            for sampler in (base.sampler, *self._at(base, levels)):
                key, seconds = sampler.model_dump_json(), self._costs.seconds(sampler)
                # leaving out steps of a base makes it no better
                if key not in seen and not beaten(seconds, most):
                    seen[key] = sampler, seconds, self._runs.psnr_db(sampler, 0)
            self._listener.finished("first video", schedule_name(base.sampler), None)
        near = [sampler for sampler, s, db in seen.values() if not beaten(s, db + MARGIN_DB)]
        self._listener.start("all videos", [schedule_name(s) for s in near])
        found = []
        for sampler in near:
            self._listener.working("all videos", schedule_name(sampler), "try")
            found.append(self.tried(sampler))
            self._listener.finished("all videos", schedule_name(sampler), None)
        return front_of(found)

    def _at(self, base: _Base, levels: Sequence[float]) -> Iterator[SamplerRecipe]:
        """What each of the base's fronts has at these times."""
        for level in sorted(levels, reverse=True):
            for difference, found in base.fronts:
                fits = next((f for f in found if f.cost <= level * UNITS_PER_S), None)
                if fits is not None:
                    yield as_sampler(base.sampler, fits.modes, difference, self._blocks)


def front_of(tried: Sequence[Tried]) -> tuple[Tried, ...]:
    """Those that no other is better than in both time and quality, the slowest first."""
    front: list[Tried] = []
    # predictions that differ by rounding alone are the same
    for one in sorted(tried, key=lambda t: (round(t.seconds * UNITS_PER_S), -t.psnr_db)):
        if not front or one.psnr_db > front[-1].psnr_db:
            front.append(one)
    return tuple(reversed(front))


def _bases(own: SamplerRecipe, full: SamplerRecipe, provided: set[str]) -> Iterator[_Base]:
    """The full schedule, fewer steps, and each with the recipe's merged steps and static leap, in proportion."""
    after = own.leap.after if isinstance(own.leap, StaticLeap) else 0
    seen = set()
    for share in SHARES:
        steps = round(own.steps * share)
        for merged in dict.fromkeys((0, round(own.merged_steps * share))):
            for leap_after in dict.fromkeys((0, round(after * share))):
                calls = leap_after + 1 if leap_after else steps
                if calls < 2 or (steps, merged, leap_after) in seen or leap_after >= steps:
                    continue
                seen.add((steps, merged, leap_after))
                leap = StaticLeap(after=leap_after) if leap_after else None
                functions = {conditional(BASE), *([conditional(MERGED)] if merged else [])}
                alone: tuple[Mode, ...] = ("conditional", "reuse conditional") if functions <= provided else ()
                update = {"steps": steps, "merged_steps": merged, "leap": leap}
                yield _Base(full.model_copy(update=update), calls, ("both", "reuse", *alone))
