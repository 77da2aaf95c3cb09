"""Size against accuracy, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.build.budget import Point, Settled

if TYPE_CHECKING:
    from PIL import Image

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 560, 60, 40, 30, 60
CURVE, MEASURED, ALIKE, GRID = "#1f6fb4", "#c0392b", "#555555", "#dddddd"
LOWEST_DB = -5.0
"""Worse than that is no picture any more."""


def draw(settled: Sequence[Settled], path: Path) -> None:
    """A picture (PNG) of the size of all weights against the error expected of it, for each budget, one below another.

    The line is the best choice at every size, crosses have all weights kept alike, the dot is what was chosen, as
    measured.
    """
    from PIL import Image

    picture = Image.new("RGB", (WIDTH, HEIGHT * len(settled)), "white")
    for number, each in enumerate(settled):
        picture.paste(_drawn(each), (0, HEIGHT * number))
    picture.save(path, format="PNG", optimize=True)


def _drawn(settled: Settled) -> Image.Image:
    from PIL import Image, ImageDraw

    measured = Point(settled.bytes, settled.error)
    curve = [p for p in settled.curve if p.error > 0 and p.sqnr_db > LOWEST_DB]
    alike = [p for p in settled.alike if p.error > 0 and p.sqnr_db > LOWEST_DB]
    shown = [*curve, *alike, measured]
    unit, name = _unit(max(p.bytes for p in shown))
    sizes, worths = [p.bytes / unit for p in shown], [min(p.sqnr_db, 150.0) for p in shown]
    # the last steps of the curve, where next to nothing is quantized, would leave no room for the others
    highest = max(70.0, measured.sqnr_db + 5, *(p.sqnr_db for p in alike)) if alike else max(worths)
    low, high = wide(min(worths), min(highest, max(worths)))
    least, most = wide(min(sizes), max(sizes))

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + (point.bytes / unit - least) / (most - least) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - min(point.sqnr_db, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return x, y

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    for db in ticks(low, high):
        y = TOP + (high - db) / (high - low) * (HEIGHT - TOP - BOTTOM)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
        pen.text((LEFT - 8, y), f"{db:g}", fill="black", font_size=13, anchor="rm")
    for size in ticks(least, most):
        x = LEFT + (size - least) / (most - least) * (WIDTH - LEFT - RIGHT)
        pen.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill=GRID)
        pen.text((x, HEIGHT - BOTTOM + 8), f"{size:g}", fill="black", font_size=13, anchor="mt")
    pen.line([place(p) for p in curve if p.sqnr_db <= high], fill=CURVE, width=2)
    below = -math.inf  # where the last name stands: those of points close together go one below the other
    for point in sorted(alike, key=lambda p: -p.sqnr_db):
        x, y = place(point)
        pen.line([(x - 4, y - 4), (x + 4, y + 4)], fill=ALIKE, width=2)
        pen.line([(x - 4, y + 4), (x + 4, y - 4)], fill=ALIKE, width=2)
        below = max(below + 12, y)
        pen.text((x + 8, below), point.name, fill=ALIKE, font_size=11, anchor="lm")
    x, y = place(measured)
    pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=MEASURED)
    pen.text((x - 8, y - 10), f"chosen: {measured.sqnr_db:.1f} dB measured", fill=MEASURED, font_size=13, anchor="rm")
    title = f"{', '.join(settled.components)}: SQNR of the output in dB, by {name} of weights"
    pen.text((LEFT, 12), title, fill="black", font_size=15)
    legend = "line: best choice at each size (expected); crosses: all weights alike (expected)"
    pen.text((LEFT, HEIGHT - 22), legend, fill="black", font_size=12)
    return picture


def _unit(largest: float) -> tuple[float, str]:
    return next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= u), (1.0, "bytes"))


def wide(low: float, high: float) -> tuple[float, float]:
    """A range with a little room at both ends."""
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, from five to ten or so."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 10)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
