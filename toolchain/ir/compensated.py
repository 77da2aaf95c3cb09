"""Rounding that puts each column's error right in the columns that are not rounded yet (GPTQ: Frantar et al., 2022).

A linear layer's output is off by ``E·x`` for an error ``E`` of its matrix; with the second moments ``H`` of its inputs,
the mean square of that is ``E·H·Eᵀ``, row by row. Columns are rounded one after the other; what a column is off by is
taken off the later ones in the proportion that makes up for most of it, which the Cholesky factor of the inverse of
``H`` says. All of it is done in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

DAMPING = 0.01
"""Of the mean of the diagonal, added to it."""
PANEL = 128
"""Columns that are rounded before the rest of a row is brought up to them, where no block says otherwise."""
PIECE = 1 << 21
"""Numbers of the matrix that are rounded together."""
Rounded = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Values ``[N, K]``, scales and zeros ``[N, K / block or 1]``."""


class Grid(Protocol):
    """What a number may be rounded to: small integers times scales."""

    @property
    def block(self) -> int | None:
        """Numbers along a row that share a scale; None for all of them."""
        ...

    def range_of(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (of the type that they are stored in) and zeros for rows ``[R, n]``, ``[R, 1]`` each."""
        ...

    def rounded(self, rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The whole numbers nearest to rows, as floats."""
        ...


def round_compensated(grid: Grid, matrix: torch.Tensor, moments: torch.Tensor) -> Rounded:
    """Round ``matrix`` ``[N, K]``; a row for which that is no gain is rounded number by number.

    Scales of a block are settled when its first column is reached.

    Args:
        moments: of the layer's inputs, ``[K, K]``.
    """
    import torch

    damped = moments.double()
    mean = float(damped.diagonal().mean())
    damping = DAMPING * mean if mean > 0 else 1.0
    damped.diagonal().add_(damping)
    # each of these is [K, K]: none is held longer than it is needed
    factor = torch.linalg.cholesky(damped)
    del damped
    factor = torch.cholesky_inverse(factor)
    factor = torch.linalg.cholesky(factor, upper=True)
    count = max(1, PIECE // matrix.shape[1])
    found = [_rows(grid, piece, moments, damping, factor) for piece in torch.split(matrix, count)]
    values, scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, scale, zero


def _rows(grid: Grid, matrix: torch.Tensor, moments: torch.Tensor, damping: float, factor: torch.Tensor) -> Rounded:
    """Some rows, of which none depends on another, both ways; of each row the better."""
    import torch

    exact, importance = matrix.double(), moments.diagonal().float() + damping
    ways = [_rounded(grid, exact.clone(), importance, f) for f in (factor, None)]
    errors = []
    for values, scale, zero in ways:
        blocks = values.reshape(*scale.shape, -1)
        decoded = ((blocks - zero[..., None]) * scale.double()[..., None]).reshape(exact.shape)
        off = decoded - exact
        products = torch.cat([off @ part.double().T for part in torch.split(moments, PANEL)], 1)  # it is symmetric
        errors.append((products * off).sum(1) + damping * off.square().sum(1))
    better = (errors[0] < errors[1])[:, None]
    values, scale, zero = (torch.where(better, a, b) for a, b in zip(*ways, strict=True))
    return values.to(torch.int8), scale, zero


def _rounded(grid: Grid, matrix: torch.Tensor, importance: torch.Tensor, factor: torch.Tensor | None) -> Rounded:
    """``matrix``, float64 and free to change, rounded column by column, with a ``factor`` compensated."""
    import torch

    width = grid.block or PANEL
    columns = matrix.shape[1]
    values = torch.empty_like(matrix)
    scales, zeros = [], []
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        if grid.block is not None or begin == 0:
            own = matrix[:, begin:end] if grid.block is not None else matrix
            weights = importance[begin : begin + own.shape[1]].expand(own.shape)
            scale, zero = grid.range_of(own.float(), weights)
            scales.append(scale)
            zeros.append(zero)
        step = scale.double()
        if factor is None:
            values[:, begin:end] = grid.rounded(matrix[:, begin:end], step, zero)
            continue
        errors = torch.empty(len(matrix), end - begin, dtype=torch.float64)
        for column in range(begin, end):
            number = matrix[:, column : column + 1]
            value = grid.rounded(number, step, zero)
            values[:, column : column + 1] = value
            error = (number - (value - zero) * step) / factor[column, column]
            errors[:, column - begin : column - begin + 1] = error
            matrix[:, column + 1 : end] -= error * factor[column, column + 1 : end]
        matrix[:, end:] -= errors @ factor[begin:end, end:]
    return values, torch.cat(scales, 1), torch.cat(zeros, 1)
