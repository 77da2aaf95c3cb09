"""Golden inputs and outputs of a block: small enough for the bundle, enough to run its artifact against.

A file holds, for every function of the artifact, as tensors named

- ``FUNCTION.in.PORT``: an input, whole;
- ``FUNCTION.mean.PORT`` and ``FUNCTION.std.PORT``: an input of more than :data:`WHOLE` numbers, as the mean and
  deviation of each channel (its last dimension, or for latents and frames, dimension 1) of a real activation.
  The input is standard normal noise (:func:`toolchain.player.sampler.gaussian`, seed :func:`noise_seed`) times
  deviation plus mean;
- ``FUNCTION.out.PORT``: eager float32's output, every n-th element of the flattened tensor, n being the largest
  prime that leaves at least :data:`SAMPLES` of them, or 1. (A prime, so that all channels are met.)

What a function's inputs have in common with ``base``'s is stored there alone. Inputs and outputs are of the
artifact's own scale and of float32 (or int32), whatever it computes in.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from toolchain.accuracy.metrics import compare, scaled, unscaled
from toolchain.accuracy.references import Case, Values, Weights, run_eager
from toolchain.formats.manifest import Accuracy
from toolchain.formats.tensors import read_tensors
from toolchain.ir.blocks import Block, Signature
from toolchain.ir.target import Engine
from toolchain.player.sampler import gaussian

WHOLE = 1 << 18
"""Largest number of elements of an input that is stored whole: a megabyte."""
SAMPLES = 1 << 12
"""At least so many elements of an output are stored, if it has them."""
PADDING = -1000.0
"""Values up to this one are masks."""


def noise_seed(function: str, port: str) -> int:
    """The seed of a drawn input: the CRC-32 of ``FUNCTION.PORT``."""
    return zlib.crc32(f"{function}.{port}".encode())


def reduce(block: Block, function: str, inputs: Mapping[str, torch.Tensor]) -> tuple[Values, Values]:
    """What is stored of a function's inputs (keys without the function), and the inputs that follow from it.

    An input that is too large to be stored gives way to noise of the same channel statistics.

    Args:
        block: as it was lowered; ``inputs`` by port, of the model's own scale.
    """
    stored: Values = {}
    for name, value in scaled(inputs, block.inputs).items():
        if value.numel() <= WHOLE:
            stored[f"in.{name}"] = value
        else:
            stored[f"mean.{name}"], stored[f"std.{name}"] = statistics(value)
    own = block.signatures[block.own_function(function)]
    drawn = draw(function, stored, {p.name: p.shape for p in own.inputs})
    return stored, unscaled(drawn, block.inputs)


def golden_cases(
    block: Block, plain: Block, functions: Sequence[str], cases: Iterable[Case], weights: Weights | None
) -> dict[str, tuple[Values, Case]]:
    """For each function what is stored of its inputs, and the eager run on them.

    The first run of a function is taken; if its inputs are too large to be stored, the function is run again on
    what can be.

    Args:
        block: as it was lowered, ``plain`` as the model has it.
        cases: eager runs, in order.
        weights: of ``plain``; only read when a function must be run again. None leaves such a function out.
    """
    chosen: dict[str, tuple[Values, Case]] = {}
    for case in cases:
        if case.function not in functions or case.function in chosen:
            continue
        whole = all(value.numel() <= WHOLE for value in case.inputs.values())
        if not whole and weights is None:
            continue
        stored, inputs = reduce(block, case.function, case.inputs)
        again = None if whole or weights is None else run_eager(plain, case.function, weights, inputs)
        chosen[case.function] = stored, again or case
    return chosen


def _channel(value: torch.Tensor) -> int:
    """The dimension of channels: the last of tokens ``[B, N, C]``, the second of pictures and clips."""
    return 1 if value.dim() >= 4 else value.dim() - 1


def statistics(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel. What masks padding is left out: it is no activation."""
    rows = value.movedim(_channel(value), 0).flatten(1)
    real = (rows > PADDING).float()
    count = real.sum(dim=1).clamp(min=1.0)
    mean = (rows * real).sum(dim=1) / count
    return mean, (((rows - mean[:, None]) * real).square().sum(dim=1) / count).sqrt()


def draw(function: str, stored: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]) -> Values:
    """A function's inputs by port, from what is stored of them (keys without the function)."""
    inputs: Values = {}
    for port, shape in shapes.items():
        if f"in.{port}" in stored:
            inputs[port] = stored[f"in.{port}"]
            continue
        noise = torch.from_numpy(gaussian(noise_seed(function, port), shape))
        channels = [1] * noise.dim()
        channels[_channel(noise)] = -1
        mean, std = (stored[f"{kind}.{port}"].reshape(channels) for kind in ("mean", "std"))
        inputs[port] = noise * std + mean
    return inputs


def sampled(value: torch.Tensor) -> torch.Tensor:
    """The elements of an output that are stored."""
    step = value.numel() // SAMPLES
    while step > 1 and any(step % d == 0 for d in range(2, math.isqrt(step) + 1)):
        step -= 1
    return value.reshape(-1)[:: max(1, step)].float().contiguous()


def write(path: Path, block: Block, chosen: Mapping[str, tuple[Values, Case]]) -> None:
    """Store the goldens of a block's functions."""
    tensors: Values = {}
    for function, (stored, case) in chosen.items():
        for name, value in stored.items():
            if not _same(tensors.get(f"base.{name}"), value):
                tensors[f"{function}.{name}"] = value.contiguous().clone()
        outputs = scaled(case.outputs, block.outputs)
        tensors |= {f"{function}.out.{k}": sampled(v).clone() for k, v in outputs.items()}
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def run(
    path: Path, signatures: Mapping[str, Signature], functions: Sequence[str], engine: Engine, limit: float
) -> dict[str, Accuracy]:
    """Run an artifact on the goldens of ``path``; accuracy by function.

    Raises:
        LoweringError: the artifact fails when run.
    """
    tensors = read_tensors(path)
    measured = {}
    for function in functions:
        stored = stored_for(tensors, function)
        results = engine(function, draw(function, stored, {p.name: p.shape for p in signatures[function].inputs}))
        expected = _under(tensors, f"{function}.out.")
        measured[function] = compare({k: sampled(results[k]) for k in expected}, expected, limit)
    return measured


def stored_for(tensors: Mapping[str, torch.Tensor], function: str) -> Values:
    """What a file of goldens has of a function, with what it has in common with ``base``."""
    return _under(tensors, "base.") | _under(tensors, f"{function}.")


def relative_error_between(path: Path, signature: Signature, function: str, a: Engine, b: Engine) -> float:
    """Relative error of what ``b`` gives against what ``a`` gives on a function's golden inputs."""
    tensors = read_tensors(path)
    stored = stored_for(tensors, function)
    inputs = draw(function, stored, {p.name: p.shape for p in signature.inputs})
    return compare(b(function, inputs), a(function, inputs), math.inf).relative_error


def _same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> Values:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
