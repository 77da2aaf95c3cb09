"""A block's weights, read from the checkpoint one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from toolchain.ir.activations import ScaleSource
from toolchain.ir.blocks import Block
from toolchain.ir.calibration import Calibrated
from toolchain.ir.stored import STATISTIC, decoding_reader, part_key, scale, statistic
from toolchain.ir.weights import Weight
from toolchain.weights.checkpoint import Checkpoint

HALVES = (torch.float16, torch.bfloat16)


class BlockWeights(Mapping[str, torch.Tensor]):
    """The weights of ``block`` as float32, by its own names; every access reads its tensors anew.

    Nothing is kept, so that whoever takes one tensor after the other never holds more than that one.
    ``dict(weights)`` reads all of them.

    Args:
        stored: read the checkpoint as if it held what these weights decode to, the same block's as its target keeps it.
        halves: leave float16 and bfloat16 as they are, for those who store them as something else at once.
        calibrated: has the scales of layers that round what comes in, and the statistics that storages need. Without
            ``stored`` these stand among the weights, for those who encode them (:func:`toolchain.ir.stored.encoded`);
            with it, they are what ``stored`` is encoded with.
    """

    def __init__(
        self,
        block: Block,
        checkpoint: Checkpoint,
        aliases: Mapping[str, str],
        *,
        stored: Mapping[str, Weight] | None = None,
        halves: bool = False,
        calibrated: Calibrated | None = None,
    ) -> None:
        self._kept = HALVES if halves else ()
        self._weights, self._calibrated = block.weights, calibrated
        read = reader(checkpoint, aliases)
        self._read = read if stored is None else decoding_reader(stored, read, calibrated)
        known = {} if stored is not None or calibrated is None else block.weights
        self._statistics = {part_key(n, STATISTIC): (n, need) for n, w in known.items() if (need := w.storage.needs)}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._statistics:
            of, need = self._statistics[name]
            return statistic(of, self._weights[of], need, self._calibrated)
        source = self._weights[name].source
        if isinstance(source, ScaleSource):
            return scale(f"weight '{name}'", source, self._calibrated)
        weight = source.value(self._read)
        return (weight if weight.dtype in self._kept else weight.float()).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter((*self._weights, *self._statistics))

    def __len__(self) -> int:
        return len(self._weights) + len(self._statistics)


def held_name(name: str, held: Iterable[str], aliases: Mapping[str, str]) -> str:
    """The name under which a checkpoint that has ``held`` keeps an official tensor: its own, or its alias."""
    return name if name in held else aliases.get(name, name)


def reader(checkpoint: Checkpoint, aliases: Mapping[str, str]) -> Callable[[str], torch.Tensor]:
    """Reads a checkpoint's tensors by their official names."""
    infos = checkpoint.infos()
    return lambda name: checkpoint.tensor(held_name(name, infos, aliases))


def read_named(
    checkpoint: Checkpoint, expected: Iterable[str], aliases: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors ``expected`` as float32, by official name; for those who want a component whole."""
    read = reader(checkpoint, aliases or {})
    return {name: read(name).float() for name in expected}
