"""Words and small figures that plans and bundles share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from toolchain.formats.calls import Step
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


def by_storage(bytes_: Mapping[str, int]) -> str:
    """How bytes are stored, most first: what is alone without its size."""
    if len(bytes_) < 2:
        return "".join(bytes_)
    return ", ".join(f"{k} {readable_size(v)}" for k, v in sorted(bytes_.items(), key=lambda kv: -kv[1]))
