"""Weights as places in tables of few numbers, found by k-means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.ir.dtypes import DTYPES, DType
from toolchain.ir.storage import Part, Storage

if TYPE_CHECKING:
    import torch

INDICES, TABLE = "indices", "table"
BITS = (1, 2, 3, 4, 6, 8)
STEPS = 60
"""Most rounds of k-means; it ends when no number moves any more."""
SEEN = 1 << 18
"""Numbers of a table's share of a weight that k-means looks at: of more, every n-th by size."""


@dataclass(frozen=True)
class Palette(Storage):
    """Each number as its place in a table of 2^bits numbers, one table for the weight or for each group of channels.

    Parts, for a weight ``[N, …]``: ``indices`` uint8 ``[N, …]``, ``table`` ``[N / group or 1, 2^bits]``, rising.

    Args:
        bits: 1, 2, 3, 4, 6 or 8.
        group: how many channels (dimension 0) share a table; None for all.
        number: the type of a table's numbers.
    """

    bits: int
    group: int | None = None
    number: DType = DTYPES["float32"]

    @property
    def name(self) -> str:
        grouped = [f"group{self.group}"] if self.group else []
        return "-".join([f"palette{self.bits}", *grouped, self.number.short])

    def refusal(self, shape: Sequence[int]) -> str | None:
        if len(shape) < 2:
            return f"{self.name} needs at least two dimensions, it has the shape {list(shape)}"
        if self.group and shape[0] % self.group:
            fits = [g for g in (1, 2, 4, 8, 16, 32, 64) if shape[0] % g == 0]
            return f"groups of {self.group} do not divide its {shape[0]} channels; {', '.join(map(str, fits))} do"
        return None

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        tables = shape[0] // self.group if self.group else 1
        return (
            Part(INDICES, tuple(shape), DTYPES["uint8"], self.bits),
            Part(TABLE, (tables, 1 << self.bits), self.number),
        )

    def encode(self, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        import torch

        tables = weight.shape[0] // self.group if self.group else 1
        rows = weight.detach().float().reshape(tables, -1)
        table = torch.stack([_means(row, 1 << self.bits) for row in rows]).to(self.number.torch)
        borders = (table[:, 1:].float() + table[:, :-1].float()) / 2
        indices = torch.empty(rows.shape, dtype=torch.uint8)
        for row, border, out in zip(rows, borders, indices, strict=True):
            for taken, given in zip(row.split(SEEN), out.split(SEEN), strict=True):
                given.copy_(torch.bucketize(taken, border))
        return {INDICES: indices.reshape(weight.shape), TABLE: table}

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        table, indices = parts[TABLE].float(), parts[INDICES]
        rows = indices.reshape(len(table), -1)
        return torch.stack([t[row.int()] for t, row in zip(table, rows, strict=True)]).reshape(indices.shape)


def _means(row: torch.Tensor, count: int) -> torch.Tensor:
    """Means of ``count`` clusters of a row of numbers, rising; the same whatever the machine.

    Numbers are sorted, so that a cluster is a stretch of them and its mean a difference of running sums. Means start
    spread over the numbers by the cube root of their density, where the best ones lie if there are many.
    """
    import torch

    ordered = row + 0.0  # of two zeros, which one comes first would depend on the machine
    ordered.numpy().sort()  # in place, and twenty times as fast as torch
    if len(ordered) > SEEN:
        ordered = ordered[(torch.arange(SEEN, dtype=torch.float64) * ((len(ordered) - 1) / (SEEN - 1))).round().long()]
    distinct = torch.unique_consecutive(ordered)
    if len(distinct) <= count:  # the table holds them all; what is left over repeats the last
        return torch.cat([distinct, distinct[-1:].expand(count - len(distinct))])
    numbers = ordered.double()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), numbers.cumsum(0)])
    gaps = (numbers[1:] - numbers[:-1]).clamp(min=0).pow(2 / 3)
    course = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.cumsum(0)])
    marks = (torch.arange(count, dtype=torch.float64) + 0.5) / count * course[-1]
    means = numbers[torch.searchsorted(course, marks).clamp(max=len(numbers) - 1)]
    for _ in range(STEPS):
        borders = torch.searchsorted(numbers, (means[1:] + means[:-1]) / 2)
        edges = torch.cat([borders.new_zeros(1), borders, borders.new_tensor([len(numbers)])])
        sizes = edges[1:] - edges[:-1]
        moved = torch.where(sizes > 0, (sums[edges[1:]] - sums[edges[:-1]]) / sizes.clamp(min=1), means)
        moved = moved.cummax(0).values
        if torch.equal(moved, means):
            break
        means = moved
    return means.float()
