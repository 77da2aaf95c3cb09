"""Time against quality of schedules, drawn with Pillow alone."""

from __future__ import annotations

from pathlib import Path

from toolchain.accuracy.golden_video import SAME_DB
from toolchain.build.tuning import Tried, Tuned
from toolchain.ui.curve import ALIKE, BOTTOM, CURVE, GRID, HEIGHT, LEFT, MEASURED, RIGHT, TOP, WIDTH, ticks, wide


def draw_front(tuned: Tuned, path: Path) -> None:
    """A picture (PNG) of predicted seconds against decibels: the front, the recipe's own schedule, and the chosen one.

    What is the same as the full schedule has no decibels and is left out.
    """
    from PIL import Image, ImageDraw

    front = [t for t in tuned.front if t.psnr_db < SAME_DB]
    marked = [(t, name, color) for t, name, color in _marks(tuned) if t.psnr_db < SAME_DB]
    shown = [*front, *(t for t, _, _ in marked)]
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    title = f"PSNR against the full schedule ({tuned.full.seconds:.4g} s) in dB, by predicted seconds of a video"
    pen.text((LEFT, 12), title, fill="black", font_size=15)
    if shown:
        low, high = wide(min(t.psnr_db for t in shown), max(t.psnr_db for t in shown))
        least, most = wide(min(t.seconds for t in shown), max(t.seconds for t in shown))

        def place(seconds: float, db: float) -> tuple[float, float]:
            x = LEFT + (seconds - least) / (most - least) * (WIDTH - LEFT - RIGHT)
            return x, TOP + (high - db) / (high - low) * (HEIGHT - TOP - BOTTOM)

        for db in ticks(low, high):
            _, y = place(least, db)
            pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
            pen.text((LEFT - 8, y), f"{db:g}", fill="black", font_size=13, anchor="rm")
        for seconds in ticks(least, most):
            x, _ = place(seconds, low)
            pen.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill=GRID)
            pen.text((x, HEIGHT - BOTTOM + 8), f"{seconds:g}", fill="black", font_size=13, anchor="mt")
        pen.line([place(t.seconds, t.psnr_db) for t in front], fill=CURVE, width=2)
        for t in front:
            x, y = place(t.seconds, t.psnr_db)
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=CURVE)
        for t, name, color in marked:
            x, y = place(t.seconds, t.psnr_db)
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=color)
            pen.text((x + 9, y + 9), f"{name}: {t.psnr_db:.1f} dB", fill=color, font_size=13, anchor="lm")
    picture.save(path, format="PNG", optimize=True)


def _marks(tuned: Tuned) -> list[tuple[Tried, str, str]]:
    found = [(tuned.own, "the recipe's schedule", ALIKE)]
    return found if tuned.chosen is None else [*found, (tuned.chosen, "chosen", MEASURED)]
