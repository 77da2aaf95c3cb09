"""A run planned and predicted, as a manifest has it."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.formats.loading import Loading, MadeFrom, Prediction, Times
from toolchain.planning.loading.planner import Planned, plan_loading
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.simulate import Timeline, simulate
from toolchain.planning.loading.unrolled import unroll


@dataclass(frozen=True)
class Predicted:
    """A run's plan with what it leads to, and where the run's seconds are from.

    ``budget_bytes`` is what was asked for: without one, the plan keeps everything.
    """

    run: Run
    planned: Planned
    timeline: Timeline
    overlap_loss: float
    times: Times
    budget_bytes: int | None

    @property
    def loads_bytes(self) -> int:
        """Bytes of all loads together."""
        return sum(self.run.by_name[span.block].weight_bytes for span in self.timeline.loads)

    def entry(self) -> Loading:
        """The manifest's part."""
        prediction = Prediction(
            total_s=self.timeline.total_s,
            compute_s=self.run.compute_s,
            load_s=sum(self.run.by_name[span.block].load_s for span in self.timeline.loads),
            stalls_s=sum(self.timeline.stalls_s),
            peak_bytes=self.timeline.peak_bytes,
            bound_s=self.planned.bound_s,
            paper_s=self.planned.paper_s,
            loads_bytes=self.loads_bytes,
        )
        made_from = MadeFrom(times=self.times, overlap_loss=self.overlap_loss, run=self.run.to_data())
        return Loading.model_validate(
            {"plan": self.planned.plan.to_data(), "prediction": prediction, "made_from": made_from}
        )


def predict(run: Run, budget_bytes: int | None, overlap_loss: float, times: Times) -> Predicted:
    """Plan a run within a budget, or with everything in memory if it is None, and simulate the plan.

    Raises:
        RecipeError: the budget is too small; as :func:`toolchain.planning.loading.planner.plan_loading`.
    """
    planned = plan_loading(run, everything_bytes(run) if budget_bytes is None else budget_bytes, overlap_loss)
    timeline = simulate(run, planned.plan, overlap_loss)
    return Predicted(run, planned, timeline, overlap_loss, times, budget_bytes)


def everything_bytes(run: Run) -> int:
    """A budget in which nothing ever has to be freed."""
    return max(1, sum(b.weight_bytes for b in run.blocks) + max(unroll(run).room))
