"""Rectified-flow sampling: noise → latents, one denoiser call a step (Open-Sora v1.2, On-device Sora).

The loop works on numpy arrays and on torch tensors alike and imports torch for neither: engines of
artifacts answer in numpy, the eager reference model in torch, and both must run the very same loop.
It knows no model, only a :class:`Denoiser`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from toolchain.errors import RecipeError
from toolchain.formats.reuse import Difference
from toolchain.formats.schedule import NUM_TRAIN_TIMESTEPS, DynamicLeap, StaticLeap, Step
from toolchain.ir.rounding import float32
from toolchain.player.leap import LeapState

Array: TypeAlias = Any
"""A float32 numpy array or torch tensor."""


class Denoiser(Protocol):
    """The model with its prompt bound: predicts for the halves of guidance that a step asks for."""

    def __call__(self, batch: Array, step: Step, x_mask: Array | None, /) -> Array:
        """One call.

        Args:
            batch: latents ``[B, C, T, H, W]``. B = 2n: n videos with their prompt, then the same without; at a step
                whose guidance is ``conditional`` B = n, those with their prompt.
            step: says the timestep, the same for all of the batch, the function to run, and what to leave out.
            x_mask: bool ``[B, T]``, False for frames that are given and clean; None without conditions.

        Returns:
            ``[B, C or 2C, T, H, W]``; the first C channels are the velocity.
        """


def sample(
    denoiser: Denoiser,
    z: Array,
    steps: Sequence[Step],
    *,
    guidance: float,
    difference: Difference = "none",
    leap: StaticLeap | DynamicLeap | None = None,
    mask: Array | None = None,
    noise: Callable[[int], Array] | None = None,
    on_step: Callable[[Step, Array], None] | None = None,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> Array:
    """Integrate z from noise to video: z ← z + v·dt with v = u + guidance·(c - u) at every step.

    Args:
        denoiser: called once a step.
        z: noise ``[n, C, T, H, W]``; given frames hold their clean latents. float32; not changed.
        steps: the calls, as from :func:`toolchain.formats.schedule.plan_steps`: with a static leap taken, or whole.
        guidance: classifier-free guidance scale s.
        difference: what stands for c - u at conditional steps: nothing (v = c), or that of the last step with both
            halves (v = c + (s - 1)·(c - u)).
        leap: when to end early (LPL); a dynamic rule is judged after every call.
        mask: ``[n, T]``: 1 for frames to make, 0 for given ones, m between for given frames that are
            noised and denoised along once t <= 1000·m.
        noise: step index → Gaussian noise in the shape of z, wanted with ``mask``. Asked for at every
            step, needed or not, so that recorded noise stays in step as with the official sampler.
        on_step: called after every step with the step that was made and the new z.
        num_train_timesteps: the timestep that is pure noise.

    Returns:
        The latents ``[n, C, T, H, W]``, of the kind of ``z``.

    Raises:
        RecipeError: the leap does not fit the steps or the batch; a mask has the wrong shape or comes without noise.
        ValueError: the denoiser's prediction has the wrong shape, or a conditional step wants the difference of an
            earlier step that there is not.
    """
    n, z = z.shape[0], _like(z, z)
    if isinstance(leap, DynamicLeap) and n > 1:
        raise RecipeError(f"a dynamic leap ends each video at its own step; sample one at a time, not {n}")
    state = LeapState(leap, len(steps))
    conditions = None if mask is None else _Conditions(mask, noise, z, num_train_timesteps)
    guided = _Guidance(float(guidance), difference)
    for step in steps:
        x0, x_mask, shown = z, None, None
        if conditions is not None:
            z, shown = conditions.before(step, z)
            x_mask = guided.batch(step, shown)
        prediction = denoiser(guided.batch(step, z), step, x_mask)
        velocity = guided.velocity(step, _like(z, prediction), z)
        if state.observe(step.index, velocity[0]):
            step = step.leaping(num_train_timesteps)
        z = z + velocity * step.dt
        if shown is not None:
            z = _where(_per_frame(shown), z, x0)
        if on_step is not None:
            on_step(step, z)
        if step.leap:
            break
    return z


class _Guidance:
    """Classifier-free guidance, with the halves that each step asks for.

    v = u + s·(c - u) from the conditional half c and the unconditional half u; where c is alone it is c, or, with a
    difference d = c - u kept from an earlier step, c + (s - 1)·d, which for d of the same step is the same v.
    """

    def __init__(self, scale: float, difference: Difference) -> None:
        self.scale, self.keeps = scale, difference == "last"
        self.difference: Array | None = None

    def batch(self, step: Step, values: Array) -> Array:
        """What goes into the denoiser of ``values`` ``[n, …]``."""
        return values if step.guidance == "conditional" else _join(values, values)

    def velocity(self, step: Step, prediction: Array, z: Array) -> Array:
        """``[n, C, T, H, W]`` of what the denoiser gave."""
        n, channels = z.shape[:2]
        alone = step.guidance == "conditional"
        wanted = [(n if alone else 2 * n, c, *z.shape[2:]) for c in (channels, 2 * channels)]
        if tuple(prediction.shape) not in wanted:
            raise ValueError(f"the denoiser returned {tuple(prediction.shape)}; wanted {wanted[0]} or {wanted[1]}")
        conditional, unconditional = prediction[:n, :channels], prediction[n:, :channels]
        if not alone:
            difference = conditional - unconditional
            if self.keeps:
                self.difference = difference
            return unconditional + self.scale * difference
        if not self.keeps:
            return conditional
        if self.difference is None:
            raise ValueError(f"step {step.index} is conditional, and no step before it computed both halves")
        return conditional + (self.scale - 1.0) * self.difference


class _Conditions:
    """Frames given as condition: which take part at a step, and the noise they start from.

    A frame takes part while mask·1000 >= t. When it begins to, it gets noise:
    (1 - t/1000)·x0 + (t/1000)·noise. Frames that do not take part stay as they are, so a frame that a
    leap passes by stays clean, as given.
    """

    def __init__(self, mask: Array, noise: Callable[[int], Array] | None, z: Array, scale: int) -> None:
        if tuple(mask.shape) != (z.shape[0], z.shape[2]):
            raise RecipeError(f"mask is {tuple(mask.shape)}; it must be {(z.shape[0], z.shape[2])}: videos, frames")
        if noise is None:
            raise RecipeError("a mask needs noise for the given frames; pass noise, as step_noise(seed, shape)")
        self.until = _like(z, mask) * scale
        self.begun = _like(z, mask) == 1
        self.noise = noise
        self.scale = scale

    def before(self, step: Step, z: Array) -> tuple[Array, Array]:
        """z as the denoiser shall see it, and bool ``[n, T]``: the frames that take part."""
        noise = _like(z, self.noise(step.index))
        share = float32(step.t / self.scale)
        noised = z * float32(1.0 - share) + noise * share
        taking_part = self.until >= step.t
        z = _where(_per_frame(taking_part & ~self.begun), noised, z)
        self.begun = taking_part
        return z, taking_part


def _per_frame(flags: Array) -> Array:
    """``[n, T]`` → ``[n, 1, T, 1, 1]``."""
    return flags[:, None, :, None, None]


def _namespace(z: Array) -> Any:
    """The module that made ``z``; torch is loaded already if there is a tensor of it."""
    return np if isinstance(z, np.ndarray) else sys.modules["torch"]


def _join(a: Array, b: Array) -> Array:
    return _namespace(a).concatenate([a, b])


def _where(condition: Array, a: Array, b: Array) -> Array:
    return _namespace(a).where(condition, a, b)


def _like(z: Array, values: Array) -> Array:
    """``values`` as float32, of the kind and on the device of ``z``."""
    if isinstance(z, np.ndarray):
        if not isinstance(values, np.ndarray):
            values = values.detach().float().cpu().numpy()
        return values.astype(np.float32, copy=False)
    torch = _namespace(z)
    return torch.as_tensor(values, dtype=torch.float32, device=z.device)


def initial_noise(seed: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """The noise that a video starts from; see :func:`gaussian`. Errors as there."""
    return gaussian(seed, shape, stream=0)


def step_noise(seed: int, shape: Sequence[int]) -> Callable[[int], npt.NDArray[np.float32]]:
    """Noise for :func:`sample` with a mask: step i draws stream i + 1 of :func:`gaussian`."""
    return lambda index: gaussian(seed, shape, stream=index + 1)


def gaussian(seed: int, shape: Sequence[int], *, stream: int = 0) -> npt.NDArray[np.float32]:
    """Standard normal float32 numbers that any device can make again, in any order and in parts.

    Element e of the array, counted row-major over all dimensions, comes from block b = e div 4, e mod 4:

    1. Philox 4x32-10 with counter (b mod 2^32, b div 2^32, stream, 0) and key (seed mod 2^32, seed div 2^32)
       gives four unsigned 32-bit words w0 … w3.
    2. In float64: each pair (w0, w1) and (w2, w3), here (p, q), becomes u = (p + 1) / 2^32 in (0, 1] and
       a = 2·pi·(q / 2^32), then r = sqrt(-2·ln u), and the two numbers r·cos a, r·sin a (Box-Muller).
    3. Elements 0, 1 are of the first pair, 2, 3 of the second; each is rounded to float32 once.

    The integers are exact everywhere. The float64 functions of two platforms may differ in the last of 53
    bits, which changes the float32 result about once in 10^8 numbers, and then by one unit in the last place.

    Args:
        seed: 0 … 2^64 - 1.
        shape: of the result; a new shape with as many elements holds the same numbers.
        stream: 0 … 2^32 - 1; independent noise for each.

    Raises:
        RecipeError: ``seed`` or ``stream`` is out of range.
    """
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32)):
        if not 0 <= value < 1 << bits:
            raise RecipeError(f"{name} is {value}; it must be 0 to 2^{bits} - 1")
    count = math.prod(shape)
    block = np.arange(-(-count // 4), dtype=np.uint64)
    constant = np.full_like(block, stream), np.zeros_like(block)
    words = _philox4x32((block & _LOW, block >> _HALF, *constant), (seed & 0xFFFFFFFF, seed >> 32))
    p, q = np.stack(words[0::2], axis=1), np.stack(words[1::2], axis=1)
    radius = np.sqrt(-2.0 * np.log((p.astype(np.float64) + 1.0) / 2.0**32))
    angle = 2.0 * math.pi * (q.astype(np.float64) / 2.0**32)
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=2)
    return pairs.reshape(-1)[:count].astype(np.float32).reshape(tuple(shape))


_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_Words: TypeAlias = tuple[npt.NDArray[np.uint64], ...]


def _philox4x32(counter: _Words, key: tuple[int, int]) -> _Words:
    """Philox 4x32-10 (Salmon et al., SC 2011) on many counters; 32-bit words held in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (product1 >> _HALF) ^ c1 ^ np.uint64(k0), product1 & _LOW
        c2, c3 = (product0 >> _HALF) ^ c3 ^ np.uint64(k1), product0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
