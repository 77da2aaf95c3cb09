"""The accuracy gate: what was lowered is executed and held against eager float32."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from toolchain.blocks import Block
from toolchain.errors import AccuracyError
from toolchain.manifest import Accuracy
from toolchain.target import Engine


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
        max_abs=_short(max(largest) if finite else math.inf),
        limit=limit,
    )


def _short(value: float) -> float:
    """Six digits: what differs beyond them differs between machines."""
    return float(f"{value:.6g}")


class ReferenceRun:
    """Eager float32 outputs of a component, block by block; each block's outputs feed the next.

    Holds activations only, and only until their last use.
    """

    def __init__(
        self, blocks: tuple[Block, ...], inputs: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
    ) -> None:
        self._values = {f"inputs.{k}": v for k, v in inputs.items()} | {f"tables.{k}": v for k, v in tables.items()}
        self._last_use = {source: i for i, b in enumerate(blocks) for source in b.sources.values()}
        self._order = {b.name: i for i, b in enumerate(blocks)}

    def inputs(self, block: Block) -> dict[str, torch.Tensor]:
        """The block's inputs, by port."""
        return {port.name: self._values[block.sources[port.name]] for port in block.inputs}

    def run(self, block: Block, function: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A function's outputs, by port."""
        with torch.no_grad():
            results = block.module(function, weights)(*self.inputs(block).values())
        return {port.name: value for port, value in zip(block.outputs, results, strict=True)}

    def advance(self, block: Block, outputs: Mapping[str, torch.Tensor]) -> None:
        """Hand a block's outputs on, and drop what nobody needs any more."""
        self._values |= {f"{block.name}.{name}": value for name, value in outputs.items()}
        done = self._order[block.name]
        for source in [s for s in self._values if self._last_use.get(s, len(self._order)) <= done]:
            del self._values[source]


def hold(
    block: Block,
    functions: tuple[str, ...],
    engine: Engine,
    references: Mapping[str, ReferenceRun],
    weights: Mapping[str, torch.Tensor],
    limit: float,
) -> dict[str, Accuracy]:
    """Execute every function of an artifact on the activations of that function's reference run.

    All reference runs are advanced, also those of functions that this block computes as ``base``.

    Returns:
        Accuracy by function.

    Raises:
        AccuracyError: names the block, the function and the figures.
    """
    measured: dict[str, Accuracy] = {}
    for function, reference in references.items():
        own = function if function in block.functions else "base"
        expected = reference.run(block, own, weights)
        if function in functions:
            accuracy = compare(engine(function, reference.inputs(block)), expected, limit)
            if not accuracy.relative_error <= limit:
                raise AccuracyError(
                    f"block '{block.name}', function '{function}': relative error {accuracy.relative_error:.3g} "
                    f"is over the limit {limit:.3g} "
                    f"(cosine {accuracy.cosine:.6f}, largest difference {accuracy.max_abs:.3g}); "
                    "the artifact is wrong, or gate.max_relative_error is too strict for this model"
                )
            measured[function] = accuracy
        reference.advance(block, expected)
    return measured
