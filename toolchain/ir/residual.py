"""Weights as scaled integers and what these leave over, as the product of two thin matrices: ``W ≈ Q + L·R``.

The thin matrices are the best of their rank for what is left over (Eckart and Young, 1936), found by random
projection and power iteration (Halko, Martinsson and Tropp, 2011). Thin matrices come first, for the weight itself;
then integers and matrices are found by turns, each for what the other leaves over (as in LoftQ: Li et al., 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.ir.affine import Affine
from toolchain.ir.importance import floored
from toolchain.ir.storage import Need, Part, Storage

if TYPE_CHECKING:
    import torch

LEFT, RIGHT = "left", "right"
ROUNDS = 3
"""How often integers and matrices are found by turns, at most; the last round that gains is kept."""
POWERS, SPARE = 2, 8
"""Power iterations, and columns that are looked at beyond the rank."""
PIECE = 1 << 20
"""Numbers that are made float64 at a time, so that a weight is never held in it."""


@dataclass(frozen=True)
class LowRank(Storage):
    """Scaled integers and a product of rank ``rank``, for the matrix ``[N, K]`` of a linear layer.

    Parts: those of ``main``, ``left`` ``[N, rank]`` and ``right`` ``[rank, K]``, of the type of the scales. A target
    multiplies by each of the three; the sum is never made.

    Args:
        main: how the integers are kept.
        rank: how many columns and rows the thin matrices have.
        weighted: find the thin matrices by the error of what the layer gives, as far as a calibration tells.
    """

    main: Affine
    rank: int
    weighted: bool = False

    @property
    def name(self) -> str:
        main, _, number = self.main.name.rpartition("-")
        return f"{main}-rank{self.rank}{'-weighted' if self.weighted else ''}-{number}"

    @property
    def needs(self) -> Need | None:
        return self.main.needs or ("importance" if self.weighted else None)

    @property
    def uncalibrated(self) -> LowRank:
        return dataclasses.replace(self, main=self.main.uncalibrated, weighted=False)

    def refusal(self, shape: Sequence[int]) -> str | None:
        if len(shape) != 2:
            return f"a product of rank {self.rank} stands beside matrices alone, it has the shape {list(shape)}"
        if self.rank >= min(shape):
            return f"a product of rank {self.rank} is no smaller than its {shape[0]} rows and {shape[1]} columns"
        return self.main.refusal(shape)

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        rows, columns = shape
        left, right = (rows, self.rank), (self.rank, columns)
        thin = (Part(LEFT, left, self.main.scale), Part(RIGHT, right, self.main.scale))
        return (*self.main.parts(shape), *thin)

    def encode(self, weight: torch.Tensor, statistic: torch.Tensor | None = None) -> Mapping[str, torch.Tensor]:
        whole = weight.detach().float()
        roots = self._roots(statistic)
        least = float("inf")
        best: Mapping[str, torch.Tensor] = {}
        left, right = self._thin(whole, roots)  # what is strongest in a weight is what integers are worst at
        for _ in range(ROUNDS):
            main = self.main.encode(whole - left.float() @ right.float(), statistic)
            left, right = self._thin(whole - self.main.decode(main), roots)
            found = {**main, LEFT: left, RIGHT: right}
            off = self.decode(found) - whole
            error = float((off if roots is None else off * roots).double().square().sum())
            if error >= least:
                break
            least, best = error, found
        return best

    def _roots(self, statistic: torch.Tensor | None) -> torch.Tensor | None:
        """Square roots of the columns' importance ``[K]``; None if all count alike."""
        if not self.weighted or statistic is None:
            return None
        columns = statistic.diagonal() if self.main.needs == "moments" else statistic[0]
        return floored(columns[None])[0].sqrt()

    def _thin(self, matrix: torch.Tensor, roots: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """:func:`thin`, as it is stored."""
        left, right = thin(matrix if roots is None else matrix * roots, self.rank)
        if roots is not None:
            right = right / roots.double()
            longer = right.norm(dim=1) / left.norm(dim=0)
            share = longer.sqrt().where(longer > 0, longer.new_ones(()))
            share = share.where(share.isfinite(), share.new_ones(()))
            left, right = left * share, right / share[:, None]
        return left.to(self.main.scale.torch), right.to(self.main.scale.torch)

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.main.decode(parts).addmm_(parts[LEFT].float(), parts[RIGHT].float())


def thin(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``left`` ``[N, rank]`` and ``right`` ``[rank, K]``, float64, whose product is nearest to ``matrix`` ``[N, K]``.

    Each column of the one is as long as the row of the other, so that neither leaves the range of float16 before the
    matrix does. What is found is the same whatever the machine, but for rounding of float64.
    """
    import torch

    rows, columns = matrix.shape
    seen = min(rank + SPARE, rows, columns)
    basis = torch.randn(columns, seen, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(POWERS):
        basis = torch.linalg.qr(_times_transposed(matrix, torch.linalg.qr(_times(matrix, basis)).Q)).Q
    left, sizes, turned = torch.linalg.svd(_times(matrix, basis), full_matrices=False)
    right = (turned @ basis.T)[:rank]
    # of what has no size the directions are chance
    sizes = torch.where(sizes > sizes[:1] * 1e-12, sizes, 0.0)[:rank].sqrt()
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()[0, :rank]
    return left[:, :rank] * (signs * sizes), right * (signs * sizes)[:, None]


def _times(matrix: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``matrix @ other``, in float64."""
    import torch

    return torch.cat([piece.double() @ other for piece in _pieces(matrix)])


def _times_transposed(matrix: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``matrix.T @ other``, in float64."""
    import torch

    found = torch.zeros(matrix.shape[1], other.shape[1], dtype=torch.float64)
    for piece, taken in zip(_pieces(matrix), torch.split(other, _rows(matrix)), strict=True):
        found.addmm_(piece.double().T, taken)
    return found


def _pieces(matrix: torch.Tensor) -> Sequence[torch.Tensor]:
    import torch

    return torch.split(matrix, _rows(matrix))


def _rows(matrix: torch.Tensor) -> int:
    return max(1, PIECE // matrix.shape[1])
