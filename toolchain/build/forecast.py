"""What a build would do, of what it would do it with, and what it needs for that; nothing is written.

Times are not predicted: they hang on the machine and the converters, of which nothing is measured here. Work is said in
bytes instead.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.build.admission import EXECUTING_FACTOR, LOWERING_FACTOR, STAMPING_FACTOR, needed_bytes
from toolchain.build.artifacts import Builder
from toolchain.build.compile import unchanged
from toolchain.errors import CheckpointError
from toolchain.formats.bundle import check_place
from toolchain.formats.recipe import ComponentRecipe, Recipe
from toolchain.formats.times import load_times
from toolchain.ir.blocks import Block
from toolchain.listener import Listener
from toolchain.planning.plan import ComponentPlan, Plan, plan_resolved
from toolchain.planning.resolve import find_weights, resolve
from toolchain.system.memory import free_bytes
from toolchain.system.read_only import ReadOnlyStore
from toolchain.weights.checkpoint import HUB, Checkpoint
from toolchain.weights.digests import are_remembered, tensor_digests
from toolchain.weights.hub import offline


@dataclass(frozen=True)
class ComponentForecast:
    """What a component takes. Counts are of blocks, and of structures to lower."""

    blocks: int
    cached: int
    """Blocks whose artifacts are in the store."""
    to_make: int
    uncertain: int
    """Blocks of which that is not known, for want of the weights' digests or of a calibration; counted as to make."""
    templates_cached: int
    """Of those that have to be there."""
    to_lower: int
    to_execute: int
    """The gate's, at most: what passed it once is not executed again."""
    fetch: tuple[str, ...]
    """Locations on the hub that are not in its cache."""
    read_bytes: int
    """Of checkpoints, for digests that are not known."""
    lower_bytes: int
    """Weights of the structures to lower, in float32."""
    write_bytes: int
    """Weights of the artifacts to make, as they keep them."""
    memory_bytes: int
    """What a process is thought to need for the largest thing to do."""


@dataclass(frozen=True)
class Forecast:
    """What a build takes. With an up-to-date bundle nothing has to be done."""

    planned: Plan
    up_to_date: bool
    components: dict[str, ComponentForecast]
    bundle_bytes: int
    """Weights of the bundle; what else is in it is small."""
    cache_bytes: int
    """What comes to the store, which the bundle shares where the file system can."""
    free_bytes: dict[str, int]
    """Room on the disks of the bundle and of the store, by folder."""
    memory_bytes: int
    free_memory_bytes: int


def forecast(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | Path | None = None,
    listener: Listener | None = None,
    direct: bool = False,
    calibration: str | Path | None = None,
    store: ReadOnlyStore | None = None,
) -> Forecast:
    """What :func:`toolchain.build.compile.compile_recipe` would do with the same arguments. Nothing is fetched.

    Raises:
        SoraCompileError: as the build would, as far as that can be known without weights.
    """
    out, base, store = Path(out), Path(base or "."), store or ReadOnlyStore()
    check_place(out)
    measured = None if calibration is None else load_times(Path(calibration))
    with offline():
        planned = plan_resolved(resolve(recipe, base, checkpoints=False), listener, measured)
        planned.check_loading()
        opened = {name: _opened(part, base) for name, part in recipe.components().items()}
        same = None not in opened.values() and unchanged(recipe, out, base, store, direct, measured) is not None
        parts = {n: _component(p, opened[n], planned, store, direct, same) for n, p in planned.components.items()}
    return Forecast(
        planned,
        same,
        parts,
        bundle_bytes=sum(c.weight_bytes for c in planned.components.values()),
        cache_bytes=sum(p.write_bytes for p in parts.values()),
        free_bytes={
            str(place): shutil.disk_usage(_existing(place)).free for place in (out.absolute().parent, store.root)
        },
        memory_bytes=max(p.memory_bytes for p in parts.values()),
        free_memory_bytes=free_bytes(),
    )


def _opened(part: ComponentRecipe, base: Path) -> Checkpoint | None:
    """A component's checkpoint; None where it is to be fetched.

    Raises:
        CheckpointError: it is not there, and not on the hub.
    """
    try:
        return find_weights(part, base)
    except CheckpointError:
        if not _remote(part):
            raise
        return None


def _remote(part: ComponentRecipe) -> list[str]:
    return [where for where in (part.checkpoint, *(lora.checkpoint for lora in part.loras)) if where.startswith(HUB)]


def _component(
    plan: ComponentPlan, opened: Checkpoint | None, planned: Plan, store: ReadOnlyStore, direct: bool, same: bool
) -> ComponentForecast:
    known = opened is not None and are_remembered(opened, store)
    certain = known and plan.passes.calibration is None
    digests = tensor_digests(opened, store, plan.name) if opened is not None and known else {}
    own = replace(plan, resolved=replace(plan.resolved, opened=opened))
    builder = Builder(own, digests, store, direct)
    there = [b for b in plan.blocks if same or (certain and store.peek("artifacts", builder.artifact_key(b)))]
    rest = [b for b in plan.blocks if not any(b is other for other in there)]
    templates = {} if direct else {builder.template_key(block): block for block in rest}
    lowered = rest if direct else [b for key, b in templates.items() if not store.peek("templates", key)]
    executed = [] if same else _executed(plan, planned.recipe.gate.mode, direct)
    unread = [] if opened is None or known else [file for layer in opened.layers() for file in layer.files()]
    work = [(lowered, LOWERING_FACTOR), (rest, STAMPING_FACTOR), (executed, EXECUTING_FACTOR)]
    return ComponentForecast(
        blocks=len(plan.blocks),
        cached=len(there),
        to_make=len(rest),
        uncertain=0 if certain else len(rest),
        templates_cached=len(templates) - len(lowered) if not direct else 0,
        to_lower=len(lowered),
        to_execute=len(executed),
        fetch=tuple(_remote(plan.resolved.recipe)) if opened is None else (),
        read_bytes=sum(file.stat().st_size for file in unread),
        lower_bytes=sum(4 * block.parameters for block in lowered),
        write_bytes=sum(block.weight_bytes for block in rest),
        memory_bytes=max((needed_bytes(b.parameters, factor) for blocks, factor in work for b in blocks), default=0),
    )


def _executed(plan: ComponentPlan, mode: str, direct: bool) -> Sequence[Block]:
    """The blocks that the gate executes at most."""
    if mode == "none":
        return []
    if mode == "structure" and not direct:
        firsts = {(pair.lowered.structure(), pair.plain.structure()): pair.lowered for pair in reversed(plan.pairs)}
        return list(firsts.values())
    return plan.blocks


def _existing(folder: Path) -> Path:
    """The nearest folder that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())
