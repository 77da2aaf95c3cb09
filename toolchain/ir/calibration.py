"""What is measured of a component's activations before its weights are kept in few bits, and how it is named.

A component is run in eager mode on the checkpoint's weights; of what comes into each linear layer and convolution is
kept what decides which of its weights matter. These statistics stand beside the checkpoint's tensors: a weight's are
found by its source, however legal forms cut or reshaped it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from toolchain.errors import LoweringError
from toolchain.ir.activations import ScaleSource
from toolchain.ir.storage import Need
from toolchain.ir.weights import WeightSource

QUARTER_OCTAVES = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""2^(0/4) … 2^(3/4)."""


class Calibration(BaseModel):
    """The inputs that a component is run on, so that it is known what comes into its layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    inputs: int = Field(default=8, ge=1, le=256, description="Inputs that each function is run on.")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Of the inputs.")


class Calibrated(Protocol):
    """Statistics of a component's activations."""

    def statistic(self, source: WeightSource, need: Need) -> torch.Tensor:
        """What a weight's storage needs to encode it (:attr:`toolchain.ir.storage.Storage.needs`).

        ``importance``: of the weight's shape (or one that can be expanded to it), the mean square of what each of its
        numbers is multiplied with. ``moments``: ``[K, K]``, the mean products of what comes into a linear layer.

        Raises:
            LoweringError: nothing was measured for the weight; names its tensors.
        """
        ...

    def scale(self, source: ScaleSource) -> torch.Tensor:
        """What a layer divides by that rounds what comes in: float32, without dimensions.

        Raises:
            LoweringError: nothing was measured for the layer; names its tensors.
        """
        ...


def coarse(values: torch.Tensor) -> torch.Tensor:
    """Numbers of no sign, float64, to the nearest quarter octave; zero stays.

    What differs from machine to machine by a rounding of float32 comes out equal, but for the rare number that lies on
    a border.
    """
    found = torch.zeros(values.numel(), dtype=torch.float64)
    for i, value in enumerate(values.double().reshape(-1).tolist()):
        if value > 0:
            octave, quarter = divmod(round(4 * math.log2(value)), 4)
            found[i] = math.ldexp(QUARTER_OCTAVES[quarter], octave)
    return found.reshape(values.shape)


def derived(source: WeightSource, measured: WeightSource, importance: torch.Tensor) -> torch.Tensor:
    """The importance of a weight that is all or a part of a ``measured`` one, in the weight's shape.

    Args:
        importance: of what was measured, of its shape without the first dimension.
    """
    whole = importance[None].expand(measured.shape)
    if source == measured:
        return whole
    taken = dataclasses.replace(source, tensors=measured.tensors[:1])
    return taken.value(lambda _: whole)


def derived_moments(source: WeightSource, measured: WeightSource, moments: torch.Tensor) -> torch.Tensor:
    """The second moments of what comes into a weight that is all of a ``measured`` one, or some of its rows or columns.

    Args:
        moments: of what was measured, ``[K, K]``.

    Raises:
        LoweringError: the weight is a part of another kind.
    """
    if source != measured:
        if source.select:
            raise LoweringError(f"second moments are of whole columns, and '{source.tensors[0]}' is taken apart")
        for dim, start, length in source.narrow:
            if dim == 1:
                moments = moments[start : start + length, start : start + length]
    return moments
