"""When blocks are loaded and run, and what that takes of memory: of a played trace, or as predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import RecipeError, ResourceError
from toolchain.formats.bundle import Bundle
from toolchain.formats.loading import Loading
from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.simulate import Span, simulate

LOADER, COMPUTE = "loader", "compute"
LANES = {"load": LOADER, "run": COMPUTE}
"""The lane of each category of a trace's spans."""
HELD = "weights, activations and values between blocks"


@dataclass(frozen=True)
class Interval:
    """Loading ``block`` (then ``function`` is None) or running it; times in seconds from the start."""

    component: str
    block: str
    function: str | None
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Lanes of intervals, and memory over time.

    ``memory`` is a step function: from each time on (seconds, ascending) so many bytes; ``memory_of`` says of what.
    """

    title: str
    lanes: Mapping[str, tuple[Interval, ...]]
    memory: tuple[tuple[float, int], ...]
    memory_of: str
    budget_bytes: int | None

    @property
    def end_s(self) -> float:
        ends = [i.end_s for lane in self.lanes.values() for i in lane]
        return max([*ends, *(t for t, _ in self.memory)], default=0.0)

    @property
    def peak_bytes(self) -> int:
        return max((b for _, b in self.memory), default=0)

    def busy_s(self, lane: str) -> float:
        """Seconds that a lane's intervals take, all together."""
        return sum(i.end_s - i.start_s for i in self.lanes.get(lane, ()))


def trace_timelines(path: Path, bundle: Bundle) -> list[Timeline]:
    """What ``play --trace`` wrote to ``path``: what was predicted of the plan that was followed, if there was such a
    prediction, and what was played.

    Raises:
        RecipeError: it is not such a trace, or one of another bundle.
        ResourceError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ResourceError(f"--trace {path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise RecipeError(f"--trace {path}: is not a trace that 'sora-compile play --trace' wrote: not JSON") from e
    try:
        about = data["otherData"]
        played_with, budget = about["recipe_sha256"], about["memory_budget_bytes"]
        budget = None if budget is None else int(budget)
        events = list(data["traceEvents"])
        titles = {e["pid"]: str(e["args"]["name"]) for e in events if e["ph"] == "M" and e["name"] == "process_name"}
        found = [_traced(titles[pid], [e for e in events if e["pid"] == pid], budget) for pid in sorted(titles)]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RecipeError(
            f"--trace {path}: is not a trace that this version's 'sora-compile play --trace' wrote "
            f"({type(e).__name__}: {e}); play the bundle again"
        ) from e
    if played_with != bundle.manifest.recipe.sha256:
        raise RecipeError(f"--trace {path}: was played with another bundle than '{bundle.path}'; play this one")
    for timeline in found:
        for interval in (i for lane in timeline.lanes.values() for i in lane):
            _check(interval, bundle, path)
    return found[::-1]


def _traced(title: str, events: Sequence[Mapping[str, Any]], budget_bytes: int | None) -> Timeline:
    """One process of a trace."""
    spans = [(LANES[e["cat"]], _interval(e)) for e in events if e["ph"] == "X"]
    memory = [(_seconds(e["ts"]), int(e["args"]["bytes"])) for e in events if e["ph"] == "C"]
    if [t for t, _ in memory] != sorted(t for t, _ in memory):
        raise ValueError("memory goes back in time")
    lanes = {lane: tuple(i for own, i in spans if own == lane) for lane in LANES.values()}
    return Timeline(title, lanes, tuple(dict([(0.0, 0), *memory]).items()), HELD, budget_bytes)


def predicted_timeline(loading: Loading, budget_bytes: int | None) -> Timeline | None:
    """The timeline that a plan is predicted to lead to; None for bundles of before there was a prediction."""
    made = loading.made_from
    if made is None:
        return None
    run, plan = Run.from_data(made.run), LoadingPlan.from_data(loading.plan)
    found = simulate(run, plan, made.overlap_loss)
    lanes = {LOADER: found.loads, COMPUTE: found.runs}
    return Timeline(
        "predicted",
        {lane: tuple(_predicted(s) for s in spans) for lane, spans in lanes.items()},
        found.memory,
        HELD,
        budget_bytes,
    )


def _predicted(span: Span) -> Interval:
    component, _, block = span.block.partition("/")
    return Interval(component, block, span.function, span.start_s, span.end_s)


def _interval(event: Mapping[str, Any]) -> Interval:
    start, took, what = _seconds(event["ts"]), _seconds(event["dur"]), event["args"]
    component, _, block = str(what["block"]).partition("/")
    function = str(what["function"]) if event["cat"] == "run" else None
    return Interval(component, block, function, start, start + took)


def _seconds(microseconds: Any) -> float:
    found = float(microseconds) / 1e6
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"a time of {found} s")
    return found


def _check(interval: Interval, bundle: Bundle, path: Path) -> None:
    component = bundle.manifest.components.get(interval.component)
    blocks = {b.name: b for b in component.blocks} if component is not None else {}
    block = blocks.get(interval.block)
    if block is None or interval.function not in (None, *block.functions):
        what = f"{interval.component}/{interval.block}" + (f".{interval.function}" if interval.function else "")
        raise RecipeError(f"--trace {path}: '{bundle.path}' has no '{what}'; play this bundle")
