"""What storing a weight in few bits does to the output of the whole component, before it is done.

The error of a component's output, as a share of the output's square, is ``|J d|²`` for an error ``d`` of a weight and
the derivative ``J`` of the output by that weight. A random direction ``v`` of unit variance in the output stands for
all of them: ``E (v·J d)² = |J d|²``, and ``g = Jᵀv`` is what one backward pass gives for all weights at once
(Hutchinson, 1990). So the passes are few, whatever the number of weights and of ways to keep them; and since gradients
go backward block by block, on what the blocks before gave, a block and its activations are all that is in memory.

Every direction is one of an input of its own: what a weight costs differs as much from input to input as from
direction to direction, and a backward pass takes as long either way.

The errors of a weight's rows (output channels) are taken for independent, as roundings are: their squares are added,
``sum_i (g_i·d_i)²``. That makes many samples of few directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from toolchain.accuracy.references import Values, Weights
from toolchain.ir.blocks import Block

APART = 1 << 31
"""Added to seeds: what a denoiser gives resembles the noise that it was given, and directions must resemble neither.
(Of a seed, torch's generator heeds 32 bits.)"""
LEAST_RUNS = 8
"""Of all functions of a graph together, each of a direction of its own."""


def inputs_each(functions: int, asked: int) -> int:
    """How many inputs each of a graph's functions is run on: those that the gate asks for, or more for enough runs."""
    return max(asked, -(-LEAST_RUNS // functions))


def random_direction(results: Values, seed: int) -> Values:
    """A random direction in a run's results, by name: for an error ``d``, ``E (v·d)²`` is ``|d|² / |result|²``."""
    generator = torch.Generator().manual_seed(APART + seed)
    noise = {name: torch.randn(r.shape, generator=generator) for name, r in results.items()}
    return {n: v / results[n].norm().clamp(min=torch.finfo(torch.float32).tiny) for n, v in noise.items()}


class Backward:
    """One run of a block's function, from which gradients are taken once.

    Args:
        weights: of the block; gradients by those in ``wanted`` are given.
        inputs: by port.
    """

    def __init__(
        self, block: Block, function: str, weights: Weights, inputs: Mapping[str, torch.Tensor], wanted: Iterable[str]
    ) -> None:
        self._block = block
        module = block.module(block.own_function(function), weights)
        own = dict(module.named_parameters())
        self._parameters = {n: own[n].requires_grad_(True) for n in wanted}
        self._inputs = {
            n: v.detach().requires_grad_(True) if v.is_floating_point() else v
            for n, v in ((p.name, inputs[p.name]) for p in block.inputs)
        }
        with torch.enable_grad():
            results = module(*self._inputs.values())
        self._results = dict(zip((p.name for p in block.outputs), results, strict=True))

    def inputs(self, cotangents: Mapping[str, torch.Tensor]) -> Values:
        """Gradients by the inputs that are floating numbers, for a direction of the outputs; zero is left out."""
        return self._gradients({n: v for n, v in self._inputs.items() if v.requires_grad}, cotangents)

    def parameters(self, cotangents: Mapping[str, torch.Tensor]) -> Values:
        """Gradients by the wanted weights, for a direction of the outputs; zero is left out."""
        return self._gradients(self._parameters, cotangents)

    def _gradients(self, by: Mapping[str, torch.Tensor], cotangents: Mapping[str, torch.Tensor]) -> Values:
        outputs = [n for n in cotangents if self._results[n].requires_grad]
        if not outputs or not by:
            return {}
        given = torch.autograd.grad(
            [self._results[n] for n in outputs],
            list(by.values()),
            [cotangents[n] for n in outputs],
            allow_unused=True,
        )
        return {n: g for n, g in zip(by, given, strict=True) if g is not None}


def squared_errors(
    gradients: Sequence[torch.Tensor], exact: torch.Tensor, stored: Sequence[Callable[[], torch.Tensor] | None]
) -> list[float | None]:
    """What each way to keep a weight costs: the mean over runs of the squared error of the output.

    Args:
        gradients: by the weight ``[N, …]``, one for each run.
        exact: the weight.
        stored: gives the weight as each way decodes it; None for what is not to be measured.
    """
    found: list[float | None] = []
    for decoded in stored:
        if decoded is None:
            found.append(None)
            continue
        error = (decoded() - exact).flatten(1)
        each = [(g.flatten(1) * error).sum(1).double().square().sum() for g in gradients]
        found.append(float(torch.stack(each).mean()) if each else 0.0)
    return found
