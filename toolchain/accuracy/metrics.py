"""The accuracy gate: what was lowered is executed and held against eager float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from toolchain.errors import AccuracyError
from toolchain.formats.manifest import Accuracy

if TYPE_CHECKING:
    from toolchain.accuracy.references import Case
    from toolchain.ir.blocks import Block, Port
    from toolchain.ir.target import Engine

EXACT_DB = 200.0
"""Signal-to-noise ratio that stands for "no difference", and the largest that is reported."""


def compare(results: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor], limit: float) -> Accuracy:
    """Measure ``results`` against ``references``, both by port name: the worst port counts."""
    errors, cosines, largest = [0.0], [1.0], [0.0]
    for name, reference in references.items():
        r, e = results[name].double().flatten(), reference.double().flatten()
        difference = r - e
        norm = float(e.norm())
        errors.append(float(difference.norm()) / norm if norm else float(difference.norm()))
        cosines.append(float(torch.nn.functional.cosine_similarity(r, e, dim=0)) if norm else 1.0)
        largest.append(float(difference.abs().max()))
    finite = all(math.isfinite(v) for v in (*errors, *largest))
    worst = max(errors) if finite else math.inf
    return Accuracy(
        relative_error=_short(worst),
        cosine=_short(min(cosines)),
        sqnr_db=_short(decibels(worst)),
        max_abs=_short(max(largest) if finite else math.inf),
        limit=limit,
    )


def decibels(relative_error: float) -> float:
    """Signal-to-quantization-noise ratio, 10·log10(|reference|² / |difference|²), at most :data:`EXACT_DB`."""
    return min(EXACT_DB, -20.0 * math.log10(relative_error)) if relative_error > 0 else EXACT_DB


def _short(value: float) -> float:
    """Six digits: what differs beyond them differs between machines."""
    return float(f"{value:.6g}")


def worst(measured: Iterable[Accuracy]) -> Accuracy:
    """The worst of each figure."""
    all_of_them = list(measured)
    return Accuracy(
        relative_error=max(a.relative_error for a in all_of_them),
        cosine=min(a.cosine for a in all_of_them),
        sqnr_db=min(a.sqnr_db for a in all_of_them),
        max_abs=max(a.max_abs for a in all_of_them),
        limit=all_of_them[0].limit,
    )


def scaled(values: Mapping[str, torch.Tensor], ports: Sequence[Port]) -> dict[str, torch.Tensor]:
    """Values of the model's own scale as ``ports`` carry them (see :class:`toolchain.ir.blocks.Port`)."""
    return {p.name: values[p.name] if p.scale == 1.0 else values[p.name] * p.scale for p in ports}


def unscaled(values: Mapping[str, torch.Tensor], ports: Sequence[Port]) -> dict[str, torch.Tensor]:
    """What ``ports`` carry as values of the model's own scale: the reverse of :func:`scaled`."""
    return {p.name: values[p.name] if p.scale == 1.0 else values[p.name] / p.scale for p in ports}


def measure(
    block: Block, functions: Sequence[str], engine: Engine, cases: Iterable[Case], limit: float
) -> dict[str, Accuracy]:
    """Execute every function of an artifact on the inputs of its eager runs.

    Args:
        block: as it was lowered; its ports say how values are scaled.
        functions: of the artifact; cases of others are left out.
        limit: recorded beside the figures; :func:`require` holds them to it.

    Returns:
        Accuracy by function, the worst of its runs.
    """
    measured: dict[str, list[Accuracy]] = {f: [] for f in functions}
    for case in cases:
        if case.function in measured:
            results = engine(case.function, scaled(case.inputs, block.inputs))
            measured[case.function].append(compare(results, scaled(case.outputs, block.outputs), limit))
    return {f: worst(a) for f, a in measured.items()}


def require(where: str, accuracy: Accuracy) -> None:
    """Refuse an accuracy over its limit.

    Raises:
        AccuracyError: ``where``, and the figures.
    """
    if not accuracy.relative_error <= accuracy.limit:
        raise AccuracyError(
            f"{where}: relative error {accuracy.relative_error:.3g} is over the limit {accuracy.limit:.3g} "
            f"(cosine {accuracy.cosine:.6f}, SQNR {accuracy.sqnr_db:.1f} dB, "
            f"largest difference {accuracy.max_abs:.3g}); "
            "the artifact is wrong, or gate.max_relative_error is too strict for this model"
        )


def require_price(where: str, component: str, price: Accuracy) -> None:
    """Refuse what quantization costs over its limit.

    Raises:
        AccuracyError: ``where``, and the figures.
    """
    if not price.relative_error <= price.limit:
        raise AccuracyError(
            f"{where}: quantization costs a relative error of {price.relative_error:.3g}, over the limit "
            f"{price.limit:.3g} (SQNR {price.sqnr_db:.1f} dB); give the block more bits by a rule of 'quantize', "
            f"or raise gate.max_quantization_error.{component}"
        )
