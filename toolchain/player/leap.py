"""Executing a leap's rule while a video is sampled (Linear Proportional Leap, On-device Sora, arXiv 2502.04363)."""

from __future__ import annotations

import math
from typing import Any

from toolchain.formats.schedule import DynamicLeap, StaticLeap
from toolchain.ir.rounding import float32


class LeapState:
    """Decides, for one sample, at which step to leap. Make a new one for every sample.

    ``cosines`` holds those of each velocity with the one before (the first is not a number; none for a
    static leap); ``best`` and ``failures_left`` are the state of the dynamic rule.
    """

    def __init__(self, leap: StaticLeap | DynamicLeap | None, steps: int) -> None:
        """``steps``: of the whole schedule. Raises RecipeError if a static leap does not lie within them."""
        if isinstance(leap, StaticLeap):
            leap.check(steps)
        self.leap = leap
        self.steps = steps
        self.cosines: list[float] = []
        self.best = leap.initial_best if isinstance(leap, DynamicLeap) else 0.0
        self.failures_left = leap.patience if isinstance(leap, DynamicLeap) else 0
        self.leapt = False
        self._next = 0
        self._previous: Any = None

    def observe(self, step_index: int, velocity: Any) -> bool:
        """Whether the step ``step_index`` leaps.

        Args:
            step_index: from 0, one after the other.
            velocity: ``[C, T, H, W]`` after guidance, a numpy array or a torch tensor; not kept.

        Raises:
            ValueError: a step is out of order or after the leap, as when a state serves two samples.
        """
        if self.leapt or step_index != self._next:
            raise ValueError(f"step {step_index} observed, but expected {self._next}; a LeapState is for one sample")
        self._next += 1
        if isinstance(self.leap, StaticLeap):
            self.leapt = step_index == self.leap.after
        elif self.leap is not None:
            self.leapt = self._judge(self.leap, step_index, velocity)
        return self.leapt

    def _judge(self, rule: DynamicLeap, step_index: int, velocity: Any) -> bool:
        current = _region(velocity, rule.region)
        cosine = math.nan if self._previous is None else _mean_cosine(current, self._previous, rule.eps)
        self._previous = current
        self.cosines.append(cosine)
        if step_index < rule.first_judged(self.steps):
            return False
        if cosine > float32(self.best + float32(rule.min_gain)):
            self.best = cosine
            if rule.reset_on_gain:
                self.failures_left = rule.patience
            return False
        self.failures_left -= 1
        return self.failures_left == 0


def _region(velocity: Any, region: str) -> Any:
    """The rows to compare, a float32 numpy copy ``[rows, length]``."""
    import numpy as np

    part = velocity[0, 0] if region == "first_frame_rows" else velocity.reshape(1, -1)
    if not isinstance(part, np.ndarray):  # a torch tensor, perhaps on another device or in bfloat16
        part = part.detach().float().cpu().numpy()
    return np.array(part, dtype=np.float32)


def _mean_cosine(a: Any, b: Any, eps: float) -> float:
    """Mean over rows of the cosine of each row of ``a`` and ``b``, ``[rows, length]``, in float32."""
    import numpy as np

    norms = [np.maximum(np.sqrt((x * x).sum(axis=1)), np.float32(eps)) for x in (a, b)]
    return float(((a * b).sum(axis=1) / (norms[0] * norms[1])).mean())
