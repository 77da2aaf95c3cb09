"""Sweeps over components: block by block in this process, or as tasks that an executor runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from pathlib import Path

from toolchain.build.executors import OwnProcesses
from toolchain.build.sweep import Sweep
from toolchain.build.tasks import builders, differs, errors_for_others, recipe_for_tasks
from toolchain.errors import ResourceError
from toolchain.formats.recipe import Recipe
from toolchain.listener import Listener
from toolchain.planning.candidates import Candidate, read_candidates
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.memory import return_large_allocations
from toolchain.system.store import Store


@dataclass(frozen=True)
class SweepTask:
    """One block of a component whose weights' errors are to be measured; texts and numbers only."""

    recipe: str
    """Without quantization, as JSON, with absolute checkpoints."""
    base: str
    store: str
    candidates: str
    component: str
    graph: int
    block: str
    key: str
    """What the store shall know the errors by."""


def run_sweep_task(task: SweepTask) -> None:
    """Measure a block's errors, in this process, into the store.

    Raises:
        ResourceError: this process has other code, tools, configurations or weights than the one that wants it done.
        RuntimeError: stands for an error that cannot be handed to another process.
    """
    return_large_allocations()
    with errors_for_others():
        for _ in range(2):
            sweep = _opened(task.recipe, task.base, task.store, task.candidates, task.component)
            if sweep.key(task.graph, task.block) == task.key:
                sweep.measure(task.graph, task.block)
                return
            _opened.cache_clear()  # files may have changed since
        raise differs(f"{task.component}/{task.block}", "measure")


@functools.lru_cache(maxsize=1)
def _opened(recipe: str, base: str, store: str, candidates: str, component: str) -> Sweep:
    planned = plan_resolved(resolve(Recipe.model_validate_json(recipe), Path(base), checkpoints=True))
    builder = builders(planned, Store(Path(store)), direct=False)[component]
    return Sweep(builder, planned, read_candidates(candidates, "candidates"))


def run_sweeps(
    sweeps: Mapping[str, Sweep],
    recipe: Recipe,
    base: Path,
    candidates: Iterable[Candidate],
    store: Store,
    listener: Listener,
    jobs: int,
    executor: Executor | None,
) -> None:
    """Measure all that is not in the store yet.

    Args:
        recipe: without quantization.
        executor: runs the tasks instead of ``jobs`` processes of our own; it is not shut down.

    Raises:
        ResourceError: a process was killed, as it is when memory is short.
    """
    own = OwnProcesses(jobs) if executor is None and jobs > 1 else None
    runner = executor or own
    waiting: list[tuple[str, str, Future[None]]] = []
    text = " ".join(map(str, candidates))
    place = (recipe_for_tasks(recipe, base), os.path.abspath(base), str(store.root), text) if runner else None
    try:
        for component, sweep in sweeps.items():
            listener.start(component, [name for _, name in sweep.blocks])
            for number, block in sweep.blocks:
                if not sweep.known(number, block):
                    listener.working(component, block, "run forward and back")
                    sweep.prepare(number, block)
                    if runner is not None and place is not None:
                        task = SweepTask(*place, component, number, block, sweep.key(number, block))
                        waiting.append((component, block, runner.submit(run_sweep_task, task)))
                        continue
                    listener.working(component, block, "measure")
                    sweep.measure(number, block)
                listener.finished(component, block, None)
        for component, block, future in waiting:
            future.result()
            listener.finished(component, block, None)
    except BaseException as e:
        if own is not None:
            own.kill()
        if isinstance(e, BrokenExecutor):
            raise ResourceError(
                "a process that measured blocks was killed, as happens when memory is short; use fewer --jobs"
            ) from e
        raise
    finally:
        for _, _, future in waiting:
            future.cancel()
        if own is not None:
            own.shutdown(wait=True, cancel_futures=True)
