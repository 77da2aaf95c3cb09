"""What Open-Sora's captions said of a video besides what it shows; a prompt has to look like them."""

from __future__ import annotations

from toolchain.formats.manifest import Suffix

AESTHETIC_SCORE = 6.5
"""The score that Open-Sora's authors ask for in every prompt."""


def suffixes(
    *, score: float | None = AESTHETIC_SCORE, flow: float | None = None, camera_motion: str | None = None
) -> tuple[Suffix, ...]:
    """What is appended to a prompt that does not say it itself; None leaves a suffix out.

    Args:
        score: aesthetic score, 4 to 7 in training.
        flow: motion score; how much moves.
        camera_motion: as ``pan right``.
    """
    values = {
        "aesthetic score:": None if score is None else f"{score:.1f}",
        "motion score:": None if flow is None else f"{flow:.1f}",
        "camera motion:": camera_motion,
    }
    return tuple(Suffix(label=label, text=f" {label} {value}.") for label, value in values.items() if value is not None)
