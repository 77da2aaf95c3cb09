"""How loading is planned and what that is predicted to cost, in words and as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.formats.loading import Loading
from toolchain.formats.times import MeasuredTimes
from toolchain.system.disk import readable_size


def loading_json(loading: Loading, budget_bytes: int | None) -> dict[str, Any]:
    """The prediction and what it is from, without the events."""
    made, prediction = loading.made_from, loading.prediction
    return {
        "memory_budget_bytes": budget_bytes,
        "prediction": None if prediction is None else prediction.model_dump(mode="json") | {"gap": gap(loading)},
        "times": None if made is None else made.times.model_dump(mode="json"),
    }


def gap(loading: Loading) -> float:
    """How much less time, relatively, any plan in the same memory could take at most; 0 without a prediction."""
    p = loading.prediction
    return max(0.0, 1 - p.bound_s / p.total_s) if p is not None and p.total_s > 0 else 0.0


def loading_text(loading: Loading, budget_bytes: int | None) -> str:
    """Predicted time, memory and loads in a few lines, for people."""
    p, made = loading.prediction, loading.made_from
    if p is None or made is None:
        return "a video: loads are as an earlier version planned them, without a prediction; build the bundle again"
    source = f"by the profile '{made.times.name}'" if made.times.kind == "device" else f"measured on {made.times.name}"
    room = "everything stays in memory" if budget_bytes is None else f"of a budget of {readable_size(budget_bytes)}"
    return (
        f"a video takes {seconds(p.total_s)} as predicted ({source}): {seconds(p.compute_s)} of computing, "
        f"{seconds(p.stalls_s)} of waiting for loads; at most {readable_size(p.peak_bytes)} of memory, {room}\n"
        f"it loads {readable_size(p.loads_bytes)} in {seconds(p.load_s)}; no plan in this memory takes less than "
        f"{seconds(p.bound_s)} (gap {gap(loading):.1%}), the published rule takes {seconds(p.paper_s)}"
    )


def loads_text(loads: int) -> str:
    """How often a block is loaded for a video, for people."""
    return {0: "in no video", 1: "once"}.get(loads, f"{loads} times")


def times_text(measured: MeasuredTimes, place: Path) -> str:
    """What was measured, for people: the file on a line of its own, then a line for each structure."""
    lines = [str(place)]
    for digest, own in measured.structures.items():
        runs = ", ".join(f"{f} {seconds(s)}" for f, s in own.run_s.items())
        lines.append(f"  {digest[:8]}: load {seconds(own.load_s)}; {runs}")
    return "\n".join([*lines, f"{measured.overlap_loss:.0%} of hidden load time is lost; on {measured.machine}"])


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
