"""Reads off a video's frames what moves how: shape, colour, background, axis and sign of the motion.

No learning: the palette and the shapes are known, so it takes nearest colours, a mask, its centre and its overlap
with the shapes drawn at the same place and of the same area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from training.grammar import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, coverage

BORDER = 3
"""Outermost pixels, which no shape ever covers."""
LEAST_TRAVEL = 10.0
"""Pixels from the first to the last quarter of the frames; less is no motion. True videos have 26."""
LEAST_AREA = 40.0


@dataclass(frozen=True)
class Reading:
    """What a video shows. ``motion`` is None without a clear motion, ``shape`` without a shape."""

    shape: str | None
    colour: str | None
    background: str
    motion: str | None
    overlap: float
    """Intersection over union with the best shape, mean over frames: 1 is a perfect drawing."""
    travel: float
    """Pixels that the centre moves along its axis, signed."""

    def correct(self, scene: Scene) -> dict[str, bool]:
        """Which of the prompt's words the video shows. ``sign`` counts only where the axis is right."""
        axis = self.motion is not None and _axis(self.motion) == _axis(scene.motion)
        return {
            "shape": self.shape == scene.shape,
            "colour": self.colour == scene.colour,
            "background": self.background == scene.background,
            "axis": axis,
            "sign": self.motion == scene.motion,
        }


def _axis(motion: str) -> int:
    return 0 if MOTIONS[motion][0] else 1


def judge(video: torch.Tensor) -> Reading:
    """Read ``video`` ``[3, frames, H, W]``, -1 … 1."""
    rgb = ((video.float().clamp(-1, 1) + 1.0) * 127.5).permute(1, 0, 2, 3)
    frames = rgb.shape[0]
    edge = torch.ones(rgb.shape[2:], dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    back = rgb[:, :, edge].permute(1, 0, 2).reshape(3, -1).median(dim=1).values
    background = _nearest(back, BACKGROUNDS)

    contrast = (rgb - back.reshape(1, 3, 1, 1)).norm(dim=1)
    strong = contrast.flatten(1).topk(60, dim=1).values.median()
    if strong < 40:
        return Reading(None, None, background, None, 0.0, 0.0)
    mask = (contrast > strong / 2).float()
    area = mask.sum(dim=(1, 2))
    if area.min() < LEAST_AREA:
        return Reading(None, None, background, None, 0.0, 0.0)
    inside = rgb.permute(1, 0, 2, 3)[:, contrast > 0.85 * strong]
    colour = _nearest(inside.median(dim=1).values, COLOURS)

    places = torch.arange(rgb.shape[-1]) + 0.5
    cx = (mask.sum(dim=1) * places).sum(dim=1) / area
    cy = (mask.sum(dim=2) * places).sum(dim=1) / area
    shape, overlap = _shape(mask, cx, cy, area, places)
    quarter = max(1, frames // 4)
    dx, dy = (float(c[-quarter:].mean() - c[:quarter].mean()) for c in (cx, cy))
    travel = dx if abs(dx) > abs(dy) else dy
    motion = None
    if abs(travel) >= LEAST_TRAVEL:
        direction = (int(math.copysign(1, dx)), 0) if abs(dx) > abs(dy) else (0, int(math.copysign(1, dy)))
        motion = next(name for name, d in MOTIONS.items() if d == direction)
    return Reading(shape, colour, background, motion, overlap, travel)


def _nearest(colour: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float((colour - torch.tensor(palette[name])).norm()))


def _shape(
    mask: torch.Tensor, cx: torch.Tensor, cy: torch.Tensor, area: torch.Tensor, places: torch.Tensor
) -> tuple[str, float]:
    """The shape whose drawing overlaps ``mask`` ``[frames, H, W]`` best, and the mean overlap."""
    x, y = places[None, None, :] - cx[:, None, None], places[None, :, None] - cy[:, None, None]
    radius = torch.sqrt(area / math.pi)[:, None, None]
    scores = {}
    for shape in SHAPES:
        drawn = coverage(shape, x, y, radius)
        both, either = torch.minimum(drawn, mask).sum(dim=(1, 2)), torch.maximum(drawn, mask).sum(dim=(1, 2))
        scores[shape] = float((both / either).mean())
    best = max(scores, key=lambda s: scores[s])
    return best, scores[best]
