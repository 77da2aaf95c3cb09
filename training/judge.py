"""Reads off a video's frames what moves how: shape, colour, background, axis and sign of the motion.

No learning: the palette and the shapes are known, so it takes nearest colours, a mask, its centre and its overlap
with the shapes drawn at the same place and of the same area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.grammar import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, SPEEDS, Scene, coverage

ATTRIBUTES = ("shape", "colour", "background", "axis", "sign", "size", "speed")
"""What is read: the keys of :meth:`Reading.correct`."""
BORDER = 3
"""Outermost pixels, which no shape ever covers."""
LEAST_TRAVEL = 8.0
"""Pixels of the whole path; less is no motion. Slow videos have 16."""
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
    """Pixels that the centre moves along its axis from the first to the last frame, signed."""
    size: str | None
    speed: str | None
    apart: float
    """Share of the shape that hangs together with none of its middle, in the worst frame: 0 is a whole shape."""

    def correct(self, scene: Scene) -> dict[str, bool]:
        """Which of the prompt's words the video shows. ``sign`` counts only where the axis is right."""
        axis = self.motion is not None and _axis(self.motion) == _axis(scene.motion)
        return {
            "shape": self.shape == scene.shape,
            "colour": self.colour == scene.colour,
            "background": self.background == scene.background,
            "axis": axis,
            "sign": self.motion == scene.motion,
            "size": self.size == scene.size,
            "speed": self.speed == scene.speed,
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
        return Reading(None, None, background, None, 0.0, 0.0, None, None, 1.0)
    mask = (contrast > strong / 2).float()
    area = mask.sum(dim=(1, 2))
    if area.min() < LEAST_AREA:
        return Reading(None, None, background, None, 0.0, 0.0, None, None, 1.0)
    inside = rgb.permute(1, 0, 2, 3)[:, contrast > 0.85 * strong]
    colour = _nearest(inside.median(dim=1).values, COLOURS)

    places = torch.arange(rgb.shape[-1]) + 0.5
    cx = (mask.sum(dim=1) * places).sum(dim=1) / area
    cy = (mask.sum(dim=2) * places).sum(dim=1) / area
    shape, overlap = _shape(mask, cx, cy, area, places)
    quarter = max(1, frames // 4)
    # from the middle of the first quarter to that of the last is less than the whole path
    whole = (frames - 1) / (frames - quarter)
    dx, dy = (float(c[-quarter:].mean() - c[:quarter].mean()) * whole for c in (cx, cy))
    travel = dx if abs(dx) > abs(dy) else dy
    motion = None
    if abs(travel) >= LEAST_TRAVEL:
        direction = (int(math.copysign(1, dx)), 0) if abs(dx) > abs(dy) else (0, int(math.copysign(1, dy)))
        motion = next(name for name, d in MOTIONS.items() if d == direction)
    radius = float(torch.sqrt(area.median() / math.pi))
    size = min(SIZES, key=lambda name: abs(radius - sum(SIZES[name]) / 2))
    speed = min(SPEEDS, key=lambda name: abs(abs(travel) - SPEEDS[name]))
    return Reading(
        shape,
        colour,
        background,
        motion,
        overlap,
        travel,
        size,
        speed if motion else None,
        _apart(mask, cx, cy, places),
    )


def _apart(mask: torch.Tensor, cx: torch.Tensor, cy: torch.Tensor, places: torch.Tensor) -> float:
    """Grows a region in ``mask`` ``[frames, H, W]`` from its pixel nearest the centre; what it does not reach."""
    far = (places[None, None, :] - cx[:, None, None]) ** 2 + (places[None, :, None] - cy[:, None, None]) ** 2
    nearest = (far + 1e6 * (1.0 - mask)).flatten(1).argmin(dim=1)
    region = F.one_hot(nearest, mask[0].numel()).float().view_as(mask)
    while True:
        grown = F.max_pool2d(region[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(grown, region):
            return float(1.0 - (region.sum(dim=(1, 2)) / mask.sum(dim=(1, 2))).min())
        region = grown


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
