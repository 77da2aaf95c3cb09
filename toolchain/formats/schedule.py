"""When the denoiser is called: rectified-flow timesteps, and the leap that ends sampling early (LPL).

Nothing here needs torch: the arithmetic of the official sampler is repeated with Python floats rounded
to the width that the official code computes in, so the timesteps are the official ones bit for bit, and
the same on every machine (torch's own float32 sqrt is, for some sizes, an ulp off). A ``t`` counts from
1000 (noise) down to 0 (video).

Sources: Open-Sora v1.2 for the timesteps; On-device Sora (arXiv 2502.04363) for LPL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from toolchain.errors import RecipeError

NUM_TRAIN_TIMESTEPS: Final = 1000
BASE_PIXELS: Final = 512 * 512  # the resolution at which the timestep transform changes nothing


class _Format(NamedTuple):
    precision: int  # bits of the significand, the hidden one included
    smallest: int  # exponent of the smallest step between two numbers
    largest: float = math.inf  # where a geometry can get there


_FORMATS: Final[Mapping[str, _Format]] = {
    "float32": _Format(24, -149),
    "bfloat16": _Format(8, -133),
    "float16": _Format(11, -24, 65504.0),
}


def _round(x: float, to: _Format) -> float:
    """``x`` to the nearest number of a narrower format, ties to even; infinity above the largest.

    One ``+ - * / sqrt`` on a Python float and then this is the correctly rounded operation of the format:
    53 bits are more than twice its precision plus two, so rounding twice does no harm.
    """
    if x == 0 or not math.isfinite(x):
        return x
    step = max(math.frexp(x)[1] - to.precision, to.smallest)
    rounded = math.ldexp(round(math.ldexp(x, -step)), step)
    return rounded if rounded <= to.largest else math.inf


def float32(x: float) -> float:
    """``x`` rounded to float32, as a Python float."""
    return _round(x, _FORMATS["float32"])


def timesteps(
    steps: int,
    *,
    height: int,
    width: int,
    frames: int,
    dtype: str = "float32",
    discrete: bool = False,
    transform: bool = True,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> tuple[float, ...]:
    """The official sampler's timesteps, newest noise first: ``steps`` float32 values from 1000 down.

    Args:
        steps: how many denoising steps.
        height, width: of the video, in pixels.
        frames: of the video (not latent frames). What is over after the last 17 is ignored, as officially.
        dtype: ``float32``, ``bfloat16`` or ``float16``: the type that the official script gives height,
            width and frames, the model's. It shifts the values slightly.
        discrete: round to whole timesteps before the transform (the phone app does; official default: no).
        transform: spend more steps at high noise for large videos (official default).
        num_train_timesteps: the timestep that is pure noise.

    Raises:
        RecipeError: a number is out of range, or the official timesteps are not numbers for this geometry.
    """
    for name, value in (("steps", steps), ("height", height), ("width", width), ("frames", frames)):
        if value < 1:
            raise RecipeError(f"{name} is {value}; it must be at least 1")
    if dtype not in _FORMATS:
        raise RecipeError(f"dtype of the timesteps is '{dtype}'; choose one of {', '.join(_FORMATS)}")
    linear = [(1.0 - i / steps) * num_train_timesteps for i in range(steps)]
    linear = [float32(round(t) if discrete else t) for t in linear]
    if not transform:
        return tuple(linear)
    ratio = _transform_ratio(height, width, frames, dtype)
    slope = _round(ratio - 1.0, _FORMATS[dtype])
    shifted = []
    for t in linear:
        u = float32(t / num_train_timesteps)
        fraction = float32(float32(ratio * u) / float32(1.0 + float32(slope * u)))
        shifted.append(float32(fraction * num_train_timesteps))
    return tuple(shifted)


def _transform_ratio(height: int, width: int, frames: int, dtype: str) -> float:
    """r of the transform t' = r·t / (1 + (r - 1)·t), computed in ``dtype``: √(h·w / 512²) · √(latent frames)."""
    if 2 <= frames <= 16:
        raise RecipeError(
            f"frames is {frames}: the official timesteps are not a number for 2 to 16 frames; use 1 or at least 17"
        )
    to = _FORMATS[dtype]
    h, w, f = (_round(v, to) for v in (height, width, frames))
    pixels = _round(h * w, to)
    if not (math.isfinite(pixels) and math.isfinite(f)):
        raise RecipeError(
            f"{height}x{width}, {frames} frames: the official timesteps are not a number in {dtype}, "
            f"which ends at {to.largest:g}; use float32 or bfloat16"
        )
    space = _round(math.sqrt(_round(pixels / BASE_PIXELS, to)), to)
    latent_frames = 1.0 if f == 1 else _round(_round(f // 17, to) * 5, to)
    return _round(space * _round(math.sqrt(latent_frames), to), to)


class StaticLeap(BaseModel):
    """Leap after ``after`` ordinary steps, with the next velocity: ``after + 1`` denoiser calls.

    LPL with a fixed n: z = z_n + v_{n+1}·t_{n+1}. The published app uses 15 of 30.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: Literal["static"] = "static"
    after: int = Field(ge=1)

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

    The rule, for step index i = 0, 1, … (executed by :class:`LeapState`):

    1. v_i is the velocity after guidance, ``[C, T, H, W]``; cos_i compares ``region`` of v_i and v_{i-1}.
    2. Nothing is judged before i = max(1, start, ⌈start_fraction · steps⌉).
    3. cos_i > best + min_gain (float32) is a gain: best = cos_i, and the failures are forgotten if
       ``reset_on_gain``. Anything else, not-a-number included, is a failure.
    4. At the ``patience``-th failure this step leaps: z + v_i · t_i / 1000 is the result.

    ``best`` starts at ``initial_best``. Cosines are x·y / (max(|x|, eps) · max(|y|, eps)).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["dynamic"] = "dynamic"
    start: int = Field(default=0, ge=0)
    start_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    patience: int = Field(ge=1)
    min_gain: float = Field(ge=0.0)
    reset_on_gain: bool
    initial_best: float
    region: Literal["first_frame_rows", "whole"]
    """``first_frame_rows``: channel 0, frame 0; mean over H of the cosines along W. ``whole``: all of v, flat."""
    eps: float = Field(default=1e-8, gt=0.0)

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
    leap: bool = False
    """This step goes all the way to t = 0 and is the last."""

    def leaping(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Step:
        """The same call followed by the leap: dt = t / 1000 (LPL: z = z_n + v(z_n, t)·t)."""
        return replace(self, dt=float32(self.t / num_train_timesteps), leap=True)


def plan_steps(
    timesteps: Sequence[float],
    leap: StaticLeap | DynamicLeap | None = None,
    *,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> tuple[Step, ...]:
    """The denoiser calls of a run: dt_i = (t_i - t_{i+1}) / 1000, the last one's t / 1000.

    A static leap cuts the list short. A dynamic one is decided while sampling, so the list is whole: the
    step for which the rule says so is replaced by its :meth:`Step.leaping` and is the last.

    Raises:
        RecipeError: there are no timesteps, or a static leap does not lie within them.
    """
    if not timesteps:
        raise RecipeError("there are no timesteps; steps must be at least 1")
    ends = (*timesteps[1:], 0.0)
    steps = [
        Step(i, float(t), float32(float32(t - end) / num_train_timesteps))
        for i, (t, end) in enumerate(zip(timesteps, ends, strict=True))
    ]
    if isinstance(leap, StaticLeap):
        leap.check(len(steps))
        return (*steps[: leap.after], steps[leap.after].leaping(num_train_timesteps))
    return tuple(steps)


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
