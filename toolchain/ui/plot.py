"""The frame that pictures of two figures against one another share, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageDraw

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 560, 60, 40, 30, 60
CURVE, MEASURED, ALIKE, GRID = "#1f6fb4", "#c0392b", "#555555", "#dddddd"


@dataclass(frozen=True)
class Axes:
    """What is shown: ``least`` to ``most`` from left to right, ``low`` to ``high`` from below."""

    least: float
    most: float
    low: float
    high: float

    @classmethod
    def around(cls, x: Collection[float], y: Collection[float], highest: float = math.inf) -> Axes:
        """With room for all of these; for nothing above ``highest``."""
        return cls(*_wide(min(x), max(x)), *_wide(min(y), min(highest, max(y))))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where in the picture something stands."""
        return (
            LEFT + (x - self.least) / (self.most - self.least) * (WIDTH - LEFT - RIGHT),
            TOP + (self.high - y) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM),
        )

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        """Lines at round numbers, and these beside them."""
        for number in _ticks(self.low, self.high):
            _, y = self.place(self.least, number)
            pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
            pen.text((LEFT - 8, y), f"{number:g}", fill="black", font_size=13, anchor="rm")
        for number in _ticks(self.least, self.most):
            x, _ = self.place(number, self.low)
            pen.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill=GRID)
            pen.text((x, HEIGHT - BOTTOM + 8), f"{number:g}", fill="black", font_size=13, anchor="mt")


def _wide(low: float, high: float) -> tuple[float, float]:
    """A range with a little room at both ends."""
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, from five to ten or so."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 10)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
