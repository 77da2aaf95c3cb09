"""Size against accuracy, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.build.budget import Point, Settled
from toolchain.ui.plot import ALIKE, CURVE, HEIGHT, LEFT, MEASURED, WIDTH, Axes

if TYPE_CHECKING:
    from PIL import Image

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
    axes = Axes.around(sizes, worths, highest)

    def place(point: Point) -> tuple[float, float]:
        return axes.place(point.bytes / unit, min(point.sqnr_db, axes.high))

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    axes.draw(pen)
    pen.line([place(p) for p in curve if p.sqnr_db <= axes.high], fill=CURVE, width=2)
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
