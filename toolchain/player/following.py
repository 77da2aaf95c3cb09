"""What a player follows: the bundle's own loading plan or one for another budget, and what that should take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from toolchain.formats.manifest import Manifest
from toolchain.planning.loading.again import plan_again
from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.run import Block, Call, Phase, Run
from toolchain.planning.loading.simulate import Timeline, simulate


@dataclass(frozen=True)
class Figures:
    """What following a plan takes, as predicted or as played. Bytes are counted as a plan counts them.

    ``total_s`` is from when the first load could begin to the end of the last call; ``stalls_s`` how long calls waited
    for loads, ``stalls`` how many did. ``load_s`` is of all loads, those included that failed once (``retries``).
    """

    total_s: float
    compute_s: float
    load_s: float
    stalls_s: float
    stalls: int
    calls: int
    loads: int
    retries: int
    loads_bytes: int
    peak_bytes: int
    budget_bytes: int

    def to_data(self) -> dict[str, Any]:
        """Plain data, as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Followed:
    """A plan for the whole video, with the bytes of all that it loads and calls.

    ``timeline`` is what it is predicted to lead to; None for bundles of before there was a prediction, whose runs know
    the bytes of weights alone.
    """

    run: Run
    plan: LoadingPlan
    timeline: Timeline | None

    @property
    def predicted(self) -> Figures | None:
        """The prediction in figures."""
        if self.timeline is None:
            return None
        t = self.timeline
        return Figures(
            total_s=t.total_s,
            compute_s=sum(s.end_s - s.start_s for s in t.runs),
            load_s=sum(s.end_s - s.start_s for s in t.loads),
            stalls_s=sum(t.stalls_s),
            stalls=sum(s > 0 for s in t.stalls_s),
            calls=len(t.runs),
            loads=len(t.loads),
            retries=0,
            loads_bytes=sum(self.run.by_name[s.block].weight_bytes for s in t.loads),
            peak_bytes=t.peak_bytes,
            budget_bytes=self.plan.budget_bytes,
        )


def followed(manifest: Manifest, memory_budget: int | None = None) -> Followed:
    """What to follow for a video.

    Args:
        memory_budget: bytes for weights and activations to plan for anew; the manifest's plan is followed if None.

    Raises:
        RecipeError: the budget is too small; says the smallest that works.
        BundleError: an earlier version wrote the manifest, so that it cannot be planned anew; or it is damaged.
    """
    if memory_budget is not None:
        found = plan_again(manifest, memory_budget)
        return Followed(found.run, found.planned.plan, found.timeline)
    plan = LoadingPlan.from_data(manifest.loading.plan)
    made = manifest.loading.made_from
    if made is None:
        return Followed(_weights_alone(manifest), plan, None)
    run = Run.from_data(made.run)
    return Followed(run, plan, simulate(run, plan, made.overlap_loss))


def _weights_alone(manifest: Manifest) -> Run:
    """The run of a bundle of before activations were planned for: nothing is known of them, nor of times."""
    blocks = tuple(
        Block(f"{name}/{b.name}", sum(b.weight_bytes.values()), 0.0)
        for name, component in manifest.components.items()
        for b in component.blocks
    )
    return Run(blocks, (Phase("video", tuple(Call(block, function, 0.0) for block, function in manifest.calls())),))
