"""Colours of charts, and what all charts have in common; on a page colours are CSS variables and follow its scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


@dataclass(frozen=True)
class Look:
    """Colours: of text, of quiet text, of grid lines, of a warning line, and of series."""

    ink: str
    quiet: str
    grid: str
    alarm: str
    series: tuple[str, ...]


ON_PAGE = Look(
    "var(--ink)", "var(--quiet)", "var(--line)", "var(--alarm)", tuple(f"var(--series-{n})" for n in range(1, 7))
)
"""See ``page.css``."""
ON_PAPER = Look(
    "#1c2530", "#5b6775", "#dfe4ea", "#b3261e", ("#1f6fb4", "#c77700", "#0b8a6a", "#8250c4", "#b0487c", "#6b7280")
)


def config(look: Look) -> dict[str, Any]:
    """Vega-Lite's ``config`` for every chart."""
    return {
        "font": FONT,
        "background": None,
        "view": {"stroke": None},
        "axis": {
            "labelColor": look.quiet,
            "titleColor": look.quiet,
            "titleFontWeight": "normal",
            "domainColor": look.grid,
            "tickColor": look.grid,
            "gridColor": look.grid,
            "labelFontSize": 11,
            "titleFontSize": 11,
        },
        "legend": {
            "orient": "top",
            "layout": {"top": {"anchor": "start", "bounds": "full"}},
            "title": None,
            "labelColor": look.ink,
            "labelFontSize": 12,
            "labelLimit": 150,
            "symbolOpacity": 1,
            "symbolBaseFillColor": look.quiet,
            "symbolStrokeWidth": 2,
        },
        "title": {"color": look.ink, "fontSize": 13, "anchor": "start", "fontWeight": 600},
    }
