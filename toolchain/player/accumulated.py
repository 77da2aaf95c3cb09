"""Executing the rule by which a range of blocks is left out until enough has changed before it (TeaCache).

Source: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (arXiv 2411.19108).
"""

from __future__ import annotations

import torch

from toolchain.formats.reuse import Accumulated


class AccumulatedState:
    """Decides, for one video, which steps leave the range out. Make a new one for every video.

    ``sum`` is what has accumulated since the range was computed last.
    """

    def __init__(self, rule: Accumulated, steps: int) -> None:
        """``steps``: of the whole schedule."""
        self.rule, self.steps = rule, steps
        self.sum = 0.0
        self._next = 0
        self._previous: torch.Tensor | None = None

    def leaves_out(self, step_index: int, value: torch.Tensor) -> bool:
        """Whether the step ``step_index`` leaves the range out.

        Args:
            step_index: from 0, one after the other.
            value: what the rule observes ``[B, …]``; a copy is kept.

        Raises:
            ValueError: a step is out of order, as when a state serves two videos.
        """
        if step_index != self._next:
            raise ValueError(f"step {step_index} observed, but expected {self._next}; a state is for one video")
        self._next += 1
        previous, self._previous = self._previous, value.detach().float().clone()
        if previous is not None:
            rows = min(len(previous), len(value))
            before = previous[:rows]
            change = (self._previous[:rows] - before).abs().mean(dtype=torch.float64)
            self.sum += self._rescaled(float(change / before.abs().mean(dtype=torch.float64)))
        leaves_out = self.rule.may_leave_out(step_index, self.steps) and self.sum < self.rule.threshold
        if not leaves_out:
            self.sum = 0.0
        return leaves_out

    def _rescaled(self, change: float) -> float:
        found = 0.0
        for coefficient in self.rule.polynomial:
            found = found * change + coefficient
        return found
