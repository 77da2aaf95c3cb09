"""When blocks are loaded and run, and what that takes of memory: of a played trace, or as predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import RecipeError, ResourceError
from toolchain.formats.bundle import Bundle
from toolchain.formats.loading import Loading
from toolchain.formats.manifest import Component
from toolchain.planning.loading.events import LoadingPlan
from toolchain.planning.loading.run import Run
from toolchain.planning.loading.simulate import Span, simulate

LOADER, COMPUTE = "loader", "compute"
LANES = {"load": LOADER, "run": COMPUTE}
"""The lane of each category of a trace's spans."""


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


def played_timeline(path: Path, bundle: Bundle) -> Timeline:
    """The timeline that ``play --trace`` wrote to ``path``. Memory is that of the weights of loaded blocks.

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
        played_with = data["otherData"]["recipe_sha256"]
        events = list(data["traceEvents"])
        components = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
        spans = [(LANES[e["cat"]], _interval(e, components)) for e in events if e["ph"] == "X"]
    except (KeyError, TypeError, ValueError) as e:
        raise RecipeError(
            f"--trace {path}: is not a trace that this version's 'sora-compile play --trace' wrote "
            f"({type(e).__name__}: {e}); play the bundle again"
        ) from e
    if played_with != bundle.manifest.recipe.sha256:
        raise RecipeError(f"--trace {path}: was played with another bundle than '{bundle.path}'; play this one")
    for _, interval in spans:
        _check(interval, bundle, path)
    lanes = {lane: tuple(i for own, i in spans if own == lane) for lane in LANES.values()}
    memory = tuple(_weights_loaded(lanes, bundle.manifest.components))
    return Timeline("played", lanes, memory, "weights of loaded blocks", bundle.manifest.memory_budget_bytes)


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
        "weights, activations and values between blocks",
        budget_bytes,
    )


def _predicted(span: Span) -> Interval:
    component, _, block = span.block.partition("/")
    return Interval(component, block, span.function, span.start_s, span.end_s)


def _interval(event: Mapping[str, Any], components: Mapping[Any, str]) -> Interval:
    start, took = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
    if not (math.isfinite(start) and math.isfinite(took) and start >= 0 and took >= 0):
        raise ValueError(f"a span from {start} that took {took}")
    block, function = str(event["name"]), None
    if event["cat"] == "run":
        block, _, function = block.rpartition(".")
    return Interval(str(components[event["tid"]]), block, function, start, start + took)


def _check(interval: Interval, bundle: Bundle, path: Path) -> None:
    component = bundle.manifest.components.get(interval.component)
    blocks = {b.name: b for b in component.blocks} if component is not None else {}
    block = blocks.get(interval.block)
    if block is None or interval.function not in (None, *block.functions):
        what = f"{interval.component}/{interval.block}" + (f".{interval.function}" if interval.function else "")
        raise RecipeError(f"--trace {path}: '{bundle.path}' has no '{what}'; play this bundle")


def _weights_loaded(
    lanes: Mapping[str, Iterable[Interval]], components: Mapping[str, Component]
) -> Iterable[tuple[float, int]]:
    """Bytes of the weights of loaded blocks over time.

    A block's weights count from when a load of it begins until the last of its runs before its next load ends: plans
    free a block when it is not to stay until its next run.
    """
    changes: list[tuple[float, int]] = []
    for name, component in components.items():
        size = {b.name: sum(b.weight_bytes.values()) for b in component.blocks}
        runs = [i for i in lanes[COMPUTE] if i.component == name]
        loads = [i for i in lanes[LOADER] if i.component == name]
        for load in loads:
            again = min(
                (i.start_s for i in loads if i.block == load.block and i.start_s > load.start_s), default=math.inf
            )
            own = (r.end_s for r in runs if r.block == load.block and load.start_s <= r.start_s < again)
            freed = max(own, default=load.end_s)
            changes += [(load.start_s, size[load.block]), (freed, -size[load.block])]
    after = {0.0: 0}
    now = 0
    for time, change in sorted(changes):
        now += change
        after[time] = now
    yield from after.items()
