"""What artifacts keep of weights, by name; and the numbers that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from toolchain.errors import LoweringError
from toolchain.ir.activations import ScaleSource
from toolchain.ir.calibration import Calibrated
from toolchain.ir.finite import finite
from toolchain.ir.storage import Need, Plain
from toolchain.ir.weights import Weight

MARK = ":"
"""Between a weight's name and the name of a part of it."""
STATISTIC = "statistic"
"""How what a storage needs to know of activations is called where it stands among weights, as if it were a part."""


def part_key(weight: str, part: str) -> str:
    """How a part of a stored weight is called: ``WEIGHT:PART``, or the weight's own name for what is all of it."""
    return f"{weight}{MARK}{part}" if part else weight


class StoredParts(Mapping[str, torch.Tensor]):
    """The parts of ``weights`` by :func:`part_key`; ``values`` are the weights' numbers, of any floating type.

    What is kept plainly is handed on as it is, for who writes it casts it piece by piece. Anything else is encoded
    when the first of its parts is asked for, and kept until another weight's is; where its storage needs a statistic,
    ``values`` has that, too.

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
            self._last = name, encoded(name, self._weights[name], self._values)
        return self._last[1][part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def encoded(name: str, weight: Weight, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A weight's stored parts.

    Args:
        values: has the weight by its name, and the statistic that its storage needs by the key of :data:`STATISTIC`.

    Raises:
        LoweringError: it has numbers that are NaN or infinite; names it.
    """
    value = values[name]
    if not finite(value):
        raise LoweringError(f"weight '{name}' has numbers that are NaN or infinite; mend the checkpoint")
    if weight.storage.needs is None:
        return weight.storage.encode(value)
    return weight.storage.encode(value, values[part_key(name, STATISTIC)])


def calibrated_values(
    name: str, weight: Weight, value: torch.Tensor, calibrated: Calibrated | None
) -> dict[str, torch.Tensor]:
    """What :func:`encoded` takes: a weight, and the statistic that its storage needs.

    Raises:
        LoweringError: there are no statistics, or none for this weight; names it.
    """
    need = weight.storage.needs
    if need is None:
        return {name: value}
    return {name: value, part_key(name, STATISTIC): statistic(name, weight, need, calibrated)}


def statistic(name: str, weight: Weight, need: Need, calibrated: Calibrated | None) -> torch.Tensor:
    """What a weight's storage needs.

    Raises:
        LoweringError: there are no statistics, or none for this weight; names it.
    """
    where = f"weight '{name}' is to be kept as {weight.storage}, which needs a calibration"
    if calibrated is None:
        raise LoweringError(f"{where}, and there is none")
    try:
        return calibrated.statistic(weight.source, need)
    except LoweringError as e:
        raise LoweringError(f"{where}: {e}") from e


def scale(where: str, source: ScaleSource, calibrated: Calibrated | None) -> torch.Tensor:
    """What a layer divides by that rounds what comes in: float32, without dimensions.

    Raises:
        LoweringError: there is no calibration, or it has not met the layer; starts with ``where``.
    """
    if calibrated is None:
        raise LoweringError(f"{where}: what comes in is to be rounded, which needs a calibration, and there is none")
    try:
        return calibrated.scale(source)
    except LoweringError as e:
        raise LoweringError(f"{where}: what comes in is to be rounded, which needs a calibration: {e}") from e


def decoding_reader(
    weights: Mapping[str, Weight], read: Callable[[str], torch.Tensor], calibrated: Calibrated | None = None
) -> Callable[[str], torch.Tensor]:
    """``read``, which gives a checkpoint's tensors, as if the checkpoint held what ``weights`` are decoded to.

    So a model in plain form runs on what an artifact keeps of its legal form, however parts were cut out or fused.

    Args:
        calibrated: has the statistics that storages need; must be what the artifact is encoded with.
    """
    of: dict[str, list[tuple[str, Weight]]] = {}
    for name, weight in weights.items():
        if not isinstance(weight.storage, Plain):
            for tensor in weight.source.tensors:
                of.setdefault(tensor, []).append((name, weight))

    def decoded(name: str, weight: Weight, given: torch.Tensor) -> torch.Tensor:
        return weight.storage.decode(encoded(name, weight, calibrated_values(name, weight, given, calibrated)))

    def value(tensor: str) -> torch.Tensor:
        found = read(tensor)
        for name, weight in of.get(tensor, ()):
            source = weight.source
            if source.tensors == (tensor,) and not source.is_part:  # a table of words is large: no second copy of it
                found = decoded(name, weight, found.reshape(source.shape)).reshape(found.shape)
                continue
            stored = decoded(name, weight, source.value(read))
            pieces = [
                found.float() if t == tensor else torch.empty_like(read(t), dtype=torch.float32) for t in source.tensors
            ]
            found = source.put(pieces, stored)[source.tensors.index(tensor)]
        return found

    return value
