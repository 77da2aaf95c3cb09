"""Weights as places in tables of few numbers, found by k-means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.ir.dtypes import DTYPES, DType
from toolchain.ir.importance import floored
from toolchain.ir.storage import Need, Part, Storage

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
        weighted: find tables by the error of what a layer gives, as far as a calibration tells, not of the weight.
    """

    bits: int
    group: int | None = None
    number: DType = DTYPES["float32"]
    weighted: bool = False

    @property
    def name(self) -> str:
        parts = [f"group{self.group}"] if self.group else []
        parts += ["weighted"] if self.weighted else []
        return "-".join([f"palette{self.bits}", *parts, self.number.short])

    @property
    def needs(self) -> Need | None:
        return "importance" if self.weighted else None

    @property
    def uncalibrated(self) -> Palette:
        return dataclasses.replace(self, weighted=False)

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

    def encode(self, weight: torch.Tensor, statistic: torch.Tensor | None = None) -> Mapping[str, torch.Tensor]:
        import torch

        tables = weight.shape[0] // self.group if self.group else 1
        rows = weight.detach().float().reshape(tables, -1)
        importance: Sequence[torch.Tensor | None] = [None] * tables
        if self.weighted and statistic is not None:
            importance = list(floored(statistic.expand(weight.shape).reshape(tables, -1)))
        found = [_means(row, 1 << self.bits, own) for row, own in zip(rows, importance, strict=True)]
        table = torch.stack(found).to(self.number.torch)
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


def _means(row: torch.Tensor, count: int, importance: torch.Tensor | None) -> torch.Tensor:
    """Means of ``count`` clusters of a row of numbers, rising; the same whatever the machine.

    Args:
        importance: of each number; all alike if None.
    """
    import torch

    if importance is None:
        ordered, masses = row + 0.0, None  # of two zeros, which one comes first would depend on the machine
        ordered.numpy().sort()  # in place, and twenty times as fast as torch
    else:
        ordered, order = row.sort(stable=True)
        masses = importance[order]
    if len(ordered) > SEEN:
        taken = (torch.arange(SEEN, dtype=torch.float64) * ((len(ordered) - 1) / (SEEN - 1))).round().long()
        ordered, masses = ordered[taken], None if masses is None else masses[taken]
    distinct = torch.unique_consecutive(ordered)
    if len(distinct) <= count:  # the table holds them all; what is left over repeats the last
        return torch.cat([distinct, distinct[-1:].expand(count - len(distinct))])
    numbers = ordered.double()
    alike = torch.ones_like(numbers)
    plain = _clusters(numbers, alike, _start(numbers, alike, count))
    if masses is None:
        return plain.float()
    mass = masses.double()
    tried = [_clusters(numbers, mass, start) for start in (_start(numbers, mass, count), plain)]
    return min(tried, key=lambda means: _error(numbers, mass, means)).float()


def _start(numbers: torch.Tensor, masses: torch.Tensor, count: int) -> torch.Tensor:
    """Where means start: spread by the cube root of the density of mass, where the best ones lie if there are many."""
    import torch

    gaps = (numbers[1:] - numbers[:-1]).clamp(min=0).pow(2 / 3) * ((masses[1:] + masses[:-1]) / 2).pow(1 / 3)
    course = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.cumsum(0)])
    marks = (torch.arange(count, dtype=torch.float64) + 0.5) / count * course[-1]
    return numbers[torch.searchsorted(course, marks).clamp(max=len(numbers) - 1)]


def _clusters(numbers: torch.Tensor, masses: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """k-means from ``means`` on, over rising ``numbers``: a cluster is a stretch of them, its mean a difference of
    running sums."""
    import torch

    zero = torch.zeros(1, dtype=torch.float64)
    sums, sizes = (torch.cat([zero, v.cumsum(0)]) for v in (numbers * masses, masses))
    for _ in range(STEPS):
        borders = torch.searchsorted(numbers, (means[1:] + means[:-1]) / 2)
        edges = torch.cat([borders.new_zeros(1), borders, borders.new_tensor([len(numbers)])])
        size = sizes[edges[1:]] - sizes[edges[:-1]]
        some = edges[1:] > edges[:-1]
        moved = torch.where(some, (sums[edges[1:]] - sums[edges[:-1]]) / torch.where(some, size, 1.0), means)
        moved = moved.cummax(0).values
        if torch.equal(moved, means):
            break
        means = moved
    return means


def _error(numbers: torch.Tensor, masses: torch.Tensor, means: torch.Tensor) -> float:
    import torch

    nearest = means[torch.searchsorted((means[1:] + means[:-1]) / 2, numbers)]
    return float((masses * (numbers - nearest).square()).sum())
