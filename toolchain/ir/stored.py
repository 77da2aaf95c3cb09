"""What artifacts keep of weights, by name; and the numbers that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from toolchain.errors import LoweringError
from toolchain.ir.finite import finite
from toolchain.ir.storage import Plain
from toolchain.ir.weights import Weight

MARK = ":"
"""Between a weight's name and the name of a part of it."""


def part_key(weight: str, part: str) -> str:
    """How a part of a stored weight is called: ``WEIGHT:PART``, or the weight's own name for what is all of it."""
    return f"{weight}{MARK}{part}" if part else weight


class StoredParts(Mapping[str, torch.Tensor]):
    """The parts of ``weights`` by :func:`part_key`; ``values`` are the weights' numbers, of any floating type.

    What is kept plainly is handed on as it is, for who writes it casts it piece by piece. Anything else is encoded
    when the first of its parts is asked for, and kept until another weight's is.

    Raises:
        LoweringError: a weight that has to be encoded has numbers that are NaN or infinite; names it.
    """

    def __init__(self, weights: Mapping[str, Weight], values: Mapping[str, torch.Tensor]) -> None:
        self._weights, self._values = weights, values
        self._names = {part_key(n, p.name): (n, p.name) for n, w in weights.items() for p in w.storage.parts(w.shape)}
        self._last: tuple[str, Mapping[str, torch.Tensor]] = "", {}

    def __getitem__(self, key: str) -> torch.Tensor:
        name, part = self._names[key]
        if isinstance(self._weights[name].storage, Plain):
            return self._values[name]
        if self._last[0] != name:
            self._last = "", {}
            self._last = name, encoded(name, self._weights[name], self._values[name])
        return self._last[1][part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def encoded(name: str, weight: Weight, value: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """A weight's stored parts.

    Raises:
        LoweringError: it has numbers that are NaN or infinite; names it.
    """
    if not finite(value):
        raise LoweringError(f"weight '{name}' has numbers that are NaN or infinite; mend the checkpoint")
    return weight.storage.encode(value)


def decoding_reader(
    weights: Mapping[str, Weight], read: Callable[[str], torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    """``read``, which gives a checkpoint's tensors, as if the checkpoint held what ``weights`` are decoded to.

    So a model in plain form runs on what an artifact keeps of its legal form, however parts were cut out or fused.
    """
    of: dict[str, list[tuple[str, Weight]]] = {}
    for name, weight in weights.items():
        if not isinstance(weight.storage, Plain):
            for tensor in weight.source.tensors:
                of.setdefault(tensor, []).append((name, weight))

    def value(tensor: str) -> torch.Tensor:
        found = read(tensor)
        if tensor in of:
            found = found.float()
        for name, weight in of.get(tensor, ()):
            source = weight.source
            stored = weight.storage.decode(encoded(name, weight, source.value(read)))
            pieces = [found if t == tensor else torch.empty_like(read(t), dtype=torch.float32) for t in source.tensors]
            found = source.put(pieces, stored)[source.tensors.index(tensor)]
        return found

    return value
