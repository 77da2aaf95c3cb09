"""Tiles in space: where they lie in a frame, and how what is computed of each becomes a whole frame again.

Light: tensors are only handed through, so torch is not imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from toolchain.errors import RecipeError
from toolchain.formats.loading import Entry

if TYPE_CHECKING:
    import torch


class Tiles(Entry):
    """How a stage cuts frames: one tile for each of ``tops`` and each of ``lefts``, row by row, all of one size.

    All is counted in rows and columns of what the stage takes; it gives ``scale`` of each for one of these.
    ``blending`` says how tiles are summed where they overlap: ``linear``, by :func:`weights`.
    """

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    overlap: int = Field(ge=0, description="Of neighbours, at least; so far weights rise from a tile's edge.")
    scale: int = Field(ge=1)
    tops: list[int] = Field(min_length=1)
    lefts: list[int] = Field(min_length=1)
    blending: Literal["linear"] = "linear"

    @model_validator(mode="after")
    def _covers(self) -> Tiles:
        if self.overlap >= min(self.height, self.width):
            raise ValueError(f"tiles: overlap {self.overlap} is not less than height and width")
        for name, starts, size in (("tops", self.tops, self.height), ("lefts", self.lefts, self.width)):
            steps = [b - a for a, b in itertools.pairwise(starts)]
            if starts[0] != 0 or any(not 0 < step <= size for step in steps):
                raise ValueError(f"tiles: {name} {starts} leave gaps between tiles of {size}, or are out of order")
        return self

    @property
    def count(self) -> int:
        """Tiles of a frame."""
        return len(self.tops) * len(self.lefts)

    @property
    def frame(self) -> tuple[int, int]:
        """Rows and columns of the whole frame that a stage takes."""
        return self.tops[-1] + self.height, self.lefts[-1] + self.width

    def check(self, taken: list[int], given: list[int], frame: list[int]) -> None:
        """Hold against rows and columns of what the stage's blocks take and give, and of the frame that is there.

        Raises:
            ValueError: they disagree.
        """
        size = [self.height, self.width]
        for what, own, other in (
            ("what blocks take", size, taken),
            ("what blocks give", [n * self.scale for n in size], given),
            ("the whole frame", list(self.frame), frame),
        ):
            if own != other:
                raise ValueError(f"decoding: tiles have {own} as {what}, but that is {other}")


def tiles_of(
    frame: tuple[int, int], *, height_px: int, width_px: int, overlap_px: int, factor: int, key: str = "vae.tiles"
) -> Tiles:
    """Tiles of a frame: at every ``height - overlap`` rows, the last one shifted inward so that it ends with the frame.

    Args:
        frame: rows and columns of latents.
        height_px, width_px, overlap_px: in pixels.
        factor: pixels a latent, in height and width.
        key: of the recipe, for messages.

    Raises:
        RecipeError: a size is no multiple of ``factor``, is more than the frame's, or the overlap is not less than it.
    """
    for name, px in (("height", height_px), ("width", width_px), ("overlap", overlap_px)):
        if px % factor:
            raise RecipeError(f"{key}.{name}: {px} is no multiple of {factor}, the pixels that a latent stands for")
    for name, px, whole in (("height", height_px, frame[0]), ("width", width_px, frame[1])):
        if px > whole * factor:
            raise RecipeError(
                f"{key}.{name}: {px} is more than the {whole * factor} pixels of a frame; give at most these"
            )
    if overlap_px >= min(height_px, width_px):
        raise RecipeError(f"{key}.overlap: {overlap_px} is not less than height {height_px} and width {width_px}")
    height, width, overlap = height_px // factor, width_px // factor, overlap_px // factor
    tops, lefts = (starts(n, size, overlap) for n, size in zip(frame, (height, width), strict=True))
    return Tiles(height=height, width=width, overlap=overlap, scale=factor, tops=tops, lefts=lefts)


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of ``size`` start that cover ``length``; neighbours overlap by ``overlap``, the last two by more if
    they must."""
    return [*range(0, length - size, size - overlap), length - size]


def weights(starts: Sequence[int], size: int, overlap: int) -> list[list[float]]:
    """Along one axis, by tile, the weight of each of its ``size`` places; a tile's are the product of both axes'.

    Before they are normalised they rise linearly from both edges of a tile: at place p
    ``min(1, (p + 1/2) / overlap, (size - p - 1/2) / overlap)``. Then they are divided by their sum over all tiles that
    have the place, so that it is 1 everywhere, and a place that one tile has alone is taken from it as it is.
    """
    ramp = [min(1.0, (min(p, size - 1 - p) + 0.5) / overlap) if overlap else 1.0 for p in range(size)]
    sums = [0.0] * (starts[-1] + size)
    for start in starts:
        for p, weight in enumerate(ramp):
            sums[start + p] += weight
    return [[weight / sums[start + p] for p, weight in enumerate(ramp)] for start in starts]


def in_tiles(
    tiles: Tiles | None, frames: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``compute`` of whole frames ``[T, C, h, w]``, a tile at a time: ``[T', C', h · scale, w · scale]``.

    Besides the result, one tile's is held at a time. Without tiles, ``compute`` is given the frames as they are.
    """
    if tiles is None:
        return compute(frames)
    whole: torch.Tensor | None = None
    for rows, columns, along_rows, along_columns in _places(tiles):
        part = compute(frames[..., rows, columns])
        if whole is None:
            whole = part.new_zeros(*part.shape[:-2], *(n * tiles.scale for n in tiles.frame))
        weight = part.new_tensor(along_rows)[:, None] * part.new_tensor(along_columns)
        whole[..., _scaled(rows, tiles.scale), _scaled(columns, tiles.scale)].addcmul_(part, weight)
    assert whole is not None  # there is a tile at least
    return whole


def _places(tiles: Tiles) -> Iterator[tuple[slice, slice, list[float], list[float]]]:
    """By tile, its rows and columns in the frame, and the weights along both of what is given."""
    s = tiles.scale
    down = weights([s * top for top in tiles.tops], s * tiles.height, s * tiles.overlap)
    along = weights([s * left for left in tiles.lefts], s * tiles.width, s * tiles.overlap)
    for top, along_rows in zip(tiles.tops, down, strict=True):
        for left, along_columns in zip(tiles.lefts, along, strict=True):
            yield slice(top, top + tiles.height), slice(left, left + tiles.width), along_rows, along_columns


def _scaled(places: slice, scale: int) -> slice:
    return slice(places.start * scale, places.stop * scale)
