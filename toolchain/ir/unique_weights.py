"""Random weights of which no two are equal: what templates are lowered with, so that each is found again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from toolchain.ir.weights import Weight


class UniqueWeights(Mapping[str, torch.Tensor]):
    """Random weights in which every tensor differs from every other, to build a template with.

    They are made anew whenever they are asked for, always the same, so that whoever needs one at a time holds one:
    those of a layer of T5-XXL take 772 MB.

    Args:
        weights: by name; what matters is their shapes.
        seed: another one gives other numbers.
    """

    def __init__(self, weights: Mapping[str, Weight], seed: int) -> None:
        self._seed, self._shapes = seed, {name: weight.shape for name, weight in weights.items()}
        self._place = {name: place for place, name in enumerate(self._shapes)}

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self._place[name]
        if self._shapes[name]:
            # torch's generator takes 32 bits of a seed
            generator = torch.Generator().manual_seed((self._seed << 16) + place)
            return torch.randn(self._shapes[name], generator=generator)
        # there are so few float16 numbers that of many drawn ones two would be equal; these are in a row, from 1 on
        bits = torch.tensor(0x3C01 + (997 * self._seed + place) % 0x3F00, dtype=torch.int16)
        return bits.view(torch.float16).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
