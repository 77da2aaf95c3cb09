"""Pictures of what the benchmark measures: a contact sheet, an animation, and a curve. Pillow and text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

LABEL = 220
"""Pixels of a contact sheet's left column, which names the rows."""


def contact_sheet(rows: Mapping[str, torch.Tensor], path: Path, columns: int = 6, zoom: int = 2) -> None:
    """Each video uint8 ``[F, H, W, 3]`` as a row of evenly spaced frames, from the first to the last."""
    frames, height, width = next(iter(rows.values())).shape[:3]
    cell = height * zoom, width * zoom
    picture = Image.new("RGB", (LABEL + columns * (cell[1] + 2), len(rows) * (cell[0] + 2)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (name, video) in enumerate(rows.items()):
        top = i * (cell[0] + 2)
        pen.text((8, top + cell[0] // 2 - 6), name, fill="black", font_size=14)
        for j in range(columns):
            frame = Image.fromarray(video[round(j * (frames - 1) / (columns - 1))].numpy())
            picture.paste(frame.resize(cell[::-1], Image.Resampling.NEAREST), (LABEL + j * (cell[1] + 2), top))
    picture.save(path, optimize=True)


def animation(videos: Sequence[torch.Tensor], path: Path, columns: int = 4, zoom: int = 2, fps: int = 12) -> None:
    """Videos uint8 ``[F, H, W, 3]`` side by side, ``columns`` a row, as an endless GIF."""
    empty = torch.full_like(videos[0], 255)
    filled = [*videos, *[empty] * (-len(videos) % columns)]
    rows = [torch.cat(filled[i : i + columns], dim=2) for i in range(0, len(filled), columns)]
    pictures = [Image.fromarray(frame.numpy()) for frame in torch.cat(rows, dim=1)]
    # one palette for all frames, without dithering: else plain areas flicker and the file grows
    shown = [p.resize((p.width * zoom, p.height * zoom), Image.Resampling.BICUBIC) for p in pictures]
    strip = Image.new("RGB", (shown[0].width, shown[0].height * 3))
    for i, picture in enumerate((shown[0], shown[len(shown) // 2], shown[-1])):
        strip.paste(picture, (0, i * picture.height))
    palette = strip.quantize(256)
    flat = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in shown]
    flat[0].save(path, save_all=True, append_images=flat[1:], duration=1000 // fps, loop=0, optimize=True)


def curve(values: Sequence[float], low: Sequence[float], high: Sequence[float], title: str, path: Path) -> None:
    """An SVG of ``values`` between ``low`` and ``high``, 0 … 1; the first is of step 2."""
    width, height, left, top = 640, 320, 56, 36
    across, down = (width - left - 20) / len(values), height - top - 48

    def place(i: int, value: float) -> str:
        return f"{left + (i + 0.5) * across:.1f},{top + (1.0 - value) * down:.1f}"

    band = [place(i, v) for i, v in enumerate(high)] + [place(i, v) for i, v in reversed(list(enumerate(low)))]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2}" y="20" text-anchor="middle" font-size="14">{title}</text>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + (1.0 - tick) * down
        lines.append(f'<path d="M{left} {y:.1f}H{width - 20}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i in range(len(values)):
        if (i + 2) % 5 == 0:
            x = left + (i + 0.5) * across
            lines.append(f'<text x="{x:.1f}" y="{top + down + 18}" text-anchor="middle">{i + 2}</text>')
    lines += [
        f'<text x="{(left + width) / 2}" y="{height - 10}" text-anchor="middle">step</text>',
        f'<polygon points="{" ".join(band)}" fill="#9ecae1" opacity="0.5"/>',
        f'<polyline points="{" ".join(place(*p) for p in enumerate(values))}" fill="none" stroke="#08519c"'
        ' stroke-width="2"/>',
        "</svg>",
    ]
    path.write_text("\n".join(lines) + "\n")
