"""Weights as small integers times scales: ``weight = scale · (value - zero)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolchain.ir.compensated import round_compensated
from toolchain.ir.dtypes import DTYPES, DType
from toolchain.ir.importance import floored
from toolchain.ir.storage import VALUES, Need, Part, Storage

if TYPE_CHECKING:
    import torch

Clip = Literal["none", "error", "output", "half-quadratic"]
"""How the range of a scale is chosen: from the largest number; by the least squared error among ranges clipped more and
more, of the weight or, as far as a calibration tells, of what its layer gives; or by half-quadratic optimisation (Badri
and Shaji, 2023), which lets few large errors be for many small ones."""

SCALE, ZERO = "scale", "zero"
SHRUNK = tuple(1.0 - 0.025 * i for i in range(24))
"""Ranges that ``error`` and ``output`` try, as shares of the largest number."""
PIECE = (1 << 15) - 1
"""Numbers that are encoded in one go: what is computed of them stays in the cache, is not so large that the system
hands out new memory for it each time, and torch does it in one thread: of more, a second one waits by spinning."""
HALF_QUADRATIC_STEPS, HALF_QUADRATIC_NORM, HALF_QUADRATIC_BETA, HALF_QUADRATIC_GROWTH = 20, 0.7, 10.0, 1.01


@dataclass(frozen=True)
class Affine(Storage):
    """Integers of ``bits`` bits with a scale for each channel (dimension 0), or for each block of a channel's numbers.

    Parts, for a weight ``[N, K, …]``: ``values`` int8 ``[N, K, …]`` in -2^(bits-1) … 2^(bits-1) - 1, ``scale``
    ``[N, K / block or 1, 1 …]``, and where the range is asymmetric ``zero``, int8 of the scale's shape and of as
    many bits. Symmetric values leave out the lowest number unless the range is clipped.

    Args:
        bits: 4 or 8.
        block: how many numbers along dimension 1 share a scale; None for a whole channel.
        symmetric: whether zero is in the middle of the range.
        clip: how ranges are chosen.
        scale: the type of scales.
        compensate: round a linear layer's columns one after the other, each making up for those before it
            (:mod:`toolchain.ir.compensated`).
    """

    bits: int
    block: int | None = None
    symmetric: bool = True
    clip: Clip = "none"
    scale: DType = DTYPES["float32"]
    compensate: bool = False

    @property
    def name(self) -> str:
        parts = [f"int{self.bits}"]
        parts += [f"block{self.block}"] if self.block else []
        parts += [] if self.symmetric else ["asymmetric"]
        parts += [] if self.clip == "none" else [f"clip-{self.clip}"]
        parts += ["compensated"] if self.compensate else []
        return "-".join([*parts, self.scale.short])

    @property
    def lowest(self) -> int:
        """The lowest value."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest value."""
        return (1 << (self.bits - 1)) - 1

    def refusal(self, shape: Sequence[int]) -> str | None:
        if len(shape) < 2:
            return f"{self.name} needs at least two dimensions, it has the shape {list(shape)}"
        if self.block and shape[1] % self.block:
            fits = [b for b in (16, 32, 64, 128, 256) if shape[1] % b == 0]
            hint = f"{', '.join(map(str, fits))} do" if fits else "no power of two from 16 on does; use int8"
            return f"blocks of {self.block} do not divide its {shape[1]} columns; {hint}"
        if self.compensate and len(shape) != 2:
            return f"errors are compensated in matrices alone, it has the shape {list(shape)}; leave it out by a rule"
        return None

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        scales = self._scale_shape(shape)
        parts = [
            Part(VALUES, tuple(shape), DTYPES["int8"], self.bits),
            Part(SCALE, scales, self.scale),
        ]
        return tuple(parts if self.symmetric else [*parts, Part(ZERO, scales, DTYPES["int8"], self.bits)])

    def _scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        blocks = shape[1] // self.block if self.block else 1
        return (shape[0], blocks, *(1 for _ in shape[2:]))

    @property
    def needs(self) -> Need | None:
        if self.compensate:
            return "moments"
        return "importance" if self.clip == "output" else None

    @property
    def uncalibrated(self) -> Affine:
        return dataclasses.replace(self, clip="none", compensate=False)

    def encode(self, weight: torch.Tensor, statistic: torch.Tensor | None = None) -> Mapping[str, torch.Tensor]:
        import torch

        shape = self._scale_shape(weight.shape)
        whole = weight.detach()
        if self.compensate and statistic is not None:
            values, scale, zero = round_compensated(self, whole.float(), statistic)
        else:
            values = torch.empty((shape[0] * shape[1], whole[0].numel() // shape[1]), dtype=DTYPES["int8"].torch)
            scale, zero = (torch.empty(len(values), 1, dtype=kind) for kind in (self.scale.torch, values.dtype))
            channels = max(1, PIECE // whole[0].numel())
            given = statistic.expand(whole.shape) if self.needs is not None and statistic is not None else None
            for start in range(0, shape[0], channels):
                own, rows = slice(start, start + channels), slice(start * shape[1], (start + channels) * shape[1])
                importance = None if given is None else given[own].reshape(len(values[rows]), -1)
                found = self._encode_rows(whole[own].float().reshape(len(values[rows]), -1), importance)
                for out, part in zip((values, scale, zero), found, strict=True):
                    out[rows].copy_(part)
        encoded = {VALUES: values.reshape(weight.shape), SCALE: scale.reshape(shape)}
        return encoded if self.symmetric else encoded | {ZERO: zero.to(DTYPES["int8"].torch).reshape(shape)}

    def _encode_rows(
        self, rows: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, zero = self.range_of(rows, importance)
        return self.rounded(rows, scale, zero), scale, zero

    def range_of(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (rounded to their type) and zeros of rows ``[R, n]``, ``[R, 1]`` each.

        Args:
            importance: of each number; only ``clip: output`` goes by it.
        """
        if self.clip in ("error", "output"):
            return self._by_least_error(
                rows, None if importance is None or self.clip == "error" else floored(importance)
            )
        (scale,), (zero,) = self._ranges(rows, (1.0,))
        if self.clip == "half-quadratic":
            scale, zero = self._half_quadratic(rows, scale, zero)
        return scale, zero

    def _ranges(self, rows: torch.Tensor, shares: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (rounded to their type) and zeros of rows ``[R, n]``, ``[shares, R, 1]`` each.

        Args:
            shares: of the range that the numbers of a row, and zero, take.
        """
        import torch

        share = torch.tensor(shares, dtype=torch.float64).reshape(-1, 1, 1)
        if self.symmetric:
            scale = self._settled(rows.abs().amax(1, keepdim=True) * (share / self.highest).float())
            return scale, torch.zeros_like(scale, dtype=torch.float32)
        low, high = rows.amin(1, keepdim=True).clamp_(max=0), rows.amax(1, keepdim=True).clamp_(min=0)
        low, high = low * share.float(), high * share.float()
        scale = self._settled((high - low) / (self.highest - self.lowest))
        zero = (self.lowest - low / scale.float()).round_().clamp_(self.lowest, self.highest)
        return scale, zero

    def _settled(self, scale: torch.Tensor) -> torch.Tensor:
        """``scale`` as it is stored: 1 for rows of zeros, and never rounded to 0."""
        import torch

        kind = self.scale.torch
        least = torch.finfo(kind).smallest_normal
        return torch.where(scale > 0, scale.clamp(min=least), torch.ones_like(scale)).to(kind)

    def rounded(
        self, rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The whole numbers nearest to rows ``[R, n]``, as floats, and in ``out`` if given."""
        import numpy as np
        import torch

        values = torch.div(rows, scale.to(rows.dtype), out=out)
        # to even, as torch does, but in this thread: torch wakes others even for few numbers, which wait by spinning
        np.rint(values.numpy(), out=values.numpy())
        return (values if self.symmetric else values.add_(zero)).clamp_(self.lowest, self.highest)

    def _by_least_error(self, rows: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and the zero of the share that leaves the least squared error; of equal ones, the largest share."""
        import torch

        scales, zeros = self._ranges(rows, SHRUNK)
        buffer, least = torch.empty_like(rows), torch.full((len(rows), 1), torch.inf)
        place = torch.zeros(least.shape, dtype=torch.int64)
        for i, (step, zero) in enumerate(zip(scales.float(), zeros, strict=True)):
            values = self.rounded(rows, step, zero, buffer)
            values = values if self.symmetric else values.sub_(zero)
            errors = values.mul_(step).sub_(rows).square_()
            error = (errors if importance is None else errors.mul_(importance)).sum(1, True)
            place.masked_fill_(error < least, i)
            torch.minimum(least, error, out=least)
        return scales.gather(0, place[None])[0], zeros.gather(0, place[None])[0]

    def _half_quadratic(
        self, rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Alternate between the sparse error, which is set aside, and the scales that fit what is left."""
        beta = HALF_QUADRATIC_BETA
        for _ in range(HALF_QUADRATIC_STEPS):
            values = self.rounded(rows, scale, zero)
            error = rows - (values - zero) * scale.float()
            size = error.abs()
            shrink = size.clamp(min=1e-8).pow(HALF_QUADRATIC_NORM - 1) / beta
            target = rows - error.sign() * (size - shrink).clamp(min=0)
            steps = values - zero
            scale = self._settled((target * steps).sum(1, True) / steps.square().sum(1, True).clamp(min=1e-12))
            beta *= HALF_QUADRATIC_GROWTH
        return scale, zero

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale, values = parts[SCALE], parts[VALUES]
        blocked = values.reshape(*scale.shape[:2], -1).float()
        one = (*scale.shape[:2], 1)
        if not self.symmetric:
            blocked -= parts[ZERO].float().reshape(one)
        return blocked.mul_(scale.float().reshape(one)).reshape(values.shape)
