"""Words and small figures that plans and bundles share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from toolchain.formats.calls import Step
from toolchain.formats.manifest import Stage
from toolchain.formats.schedule import MERGED
from toolchain.ir.functions import conditional, ungrouped
from toolchain.system.disk import readable_size


def runs(rate: str) -> str:
    """How often a block runs, for people."""
    unit = {"chunk": "chunk of latents", "frames": "group of frames"}.get(rate, rate.replace("_", " "))
    return f"each {unit}"


def merged_calls(steps: Iterable[Step]) -> int:
    """How many steps run with merged tokens."""
    return sum(ungrouped(s.function) in (MERGED, conditional(MERGED)) for s in steps)


def tiled(stages: Iterable[Stage]) -> list[tuple[int, str]]:
    """Of the stages that cut frames into tiles, how many of a frame, and of which size."""
    return [
        (t.count, f"of {t.width * t.scale}×{t.height * t.scale} pixels, which overlap by {t.overlap * t.scale} or more")
        for t in (s.tiles for s in stages)
        if t is not None
    ]


def tiled_text(stages: Iterable[Stage]) -> list[str]:
    """The same, a sentence each."""
    return [f"the decoder takes frames in {count} tiles {what}" for count, what in tiled(stages)]


def by_storage(bytes_: Mapping[str, int]) -> str:
    """How bytes are stored, most first: what is alone without its size."""
    if len(bytes_) < 2:
        return "".join(bytes_)
    return ", ".join(f"{k} {readable_size(v)}" for k, v in sorted(bytes_.items(), key=lambda kv: -kv[1]))
