"""Time against quality of schedules, drawn with Pillow alone."""

from __future__ import annotations

from pathlib import Path

from toolchain.accuracy.golden_video import SAME_DB
from toolchain.build.tuning import Tried, Tuned
from toolchain.ui.plot import ALIKE, CURVE, HEIGHT, LEFT, MEASURED, WIDTH, Axes


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
        axes = Axes.around([t.seconds for t in shown], [t.psnr_db for t in shown])
        axes.draw(pen)
        pen.line([axes.place(t.seconds, t.psnr_db) for t in front], fill=CURVE, width=2)
        for t in front:
            x, y = axes.place(t.seconds, t.psnr_db)
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=CURVE)
        for t, name, color in marked:
            x, y = axes.place(t.seconds, t.psnr_db)
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=color)
            pen.text((x + 9, y + 9), f"{name}: {t.psnr_db:.1f} dB", fill=color, font_size=13, anchor="lm")
    picture.save(path, format="PNG", optimize=True)


def _marks(tuned: Tuned) -> list[tuple[Tried, str, str]]:
    found = [(tuned.own, "the recipe's schedule", ALIKE)]
    return found if tuned.chosen is None else [*found, (tuned.chosen, "chosen", MEASURED)]
