"""Building artifacts, one after the other in this process or several at once in others.

Converters are neither thread- nor fork-safe, so other processes are spawned. Each plans the recipe for itself and
hands its results on through the store.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

from toolchain.build.artifacts import Builder, Source
from toolchain.errors import ResourceError
from toolchain.formats.recipe import Recipe
from toolchain.ir.blocks import Block
from toolchain.planning.plan import Plan, plan
from toolchain.system.memory import free_bytes, return_large_allocations
from toolchain.system.store import Entry, Store
from toolchain.weights.checkpoint import open_checkpoint
from toolchain.weights.digests import tensor_digests

PROCESS_BYTES = 900_000_000
"""What a process needs with torch and a converter loaded, measured with Core ML's."""
LOWERING_FACTOR, STAMPING_FACTOR = 6, 1
"""Memory for a lowering and for a stamp, in sizes of the block's weights in float32, measured with T5-XXL's."""


def builders(planned: Plan, base: Path, store: Store, direct: bool) -> dict[str, Builder]:
    """A builder for each component of a plan."""
    made = {}
    for name, lowering in planned.components.items():
        checkpoint = open_checkpoint(planned.recipe.components()[name].checkpoint, base)
        source = Source(checkpoint, tensor_digests(checkpoint, store))
        made[name] = Builder(lowering, source, store, direct)
    return made


@dataclass(frozen=True)
class Task:
    """One thing to build: a template, or an artifact, of a component's block by its number."""

    component: str
    index: int
    template: bool
    needed_bytes: int


class Serial:
    """Builds an artifact in this process when it is asked for."""

    def __init__(self, made: Mapping[str, Builder]) -> None:
        self._builders = made

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def artifact(self, component: str, block: Block) -> Entry:
        """The block's artifact.

        Raises:
            LoweringError: as :meth:`toolchain.build.artifacts.Builder.artifact`.
        """
        return self._builders[component].artifact(block)


class Parallel:
    """Builds artifacts in ``jobs`` processes: all templates first, then each block's as its template is there.

    No more is begun than fits the memory that is free. Leaving the context stops all of it.
    """

    def __init__(self, recipe: Recipe, base: Path, made: Mapping[str, Builder], store: Store, jobs: int) -> None:
        self._builders, self._store = made, store
        initial = (recipe.model_dump_json(), str(base), str(store.root), next(iter(made.values())).direct)
        self._pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start, initargs=initial)
        self._free_bytes, self._jobs = free_bytes(), jobs
        self._lock = threading.RLock()
        self._waiting: list[Task] = []
        self._running: dict[Task, Future[None]] = {}
        self._after: dict[tuple[str, str], list[Task]] = {}
        self._done: dict[tuple[str, int], Future[None]] = {}
        self._failed: BaseException | None = None

    def __enter__(self) -> Parallel:
        for component, builder in self._builders.items():
            for index, block in enumerate(builder.lowering.blocks):
                if self._store.get("artifacts", builder.artifact_key(block)) is not None:
                    continue
                size = 4 * block.parameters
                stamp = Task(component, index, False, PROCESS_BYTES + STAMPING_FACTOR * size)
                self._done[component, index] = Future()
                key = (component, builder.template_key(block))
                if builder.direct or self._store.get("templates", key[1]) is not None:
                    self._waiting.append(stamp)
                elif key in self._after:
                    self._after[key].append(stamp)
                else:
                    self._after[key] = [stamp]
                    self._waiting.append(Task(component, index, True, PROCESS_BYTES + LOWERING_FACTOR * size))
        self._waiting.sort(key=lambda t: not t.template)
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._waiting.clear()
        if error is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._store.sweep()

    def artifact(self, component: str, block: Block) -> Entry:
        """The block's artifact, once it is built.

        Raises:
            LoweringError: as :meth:`toolchain.build.artifacts.Builder.artifact`.
            ResourceError: a process was killed, as it is when memory is short.
        """
        builder = self._builders[component]
        index = next(i for i, b in enumerate(builder.lowering.blocks) if b.name == block.name)
        waited = self._done.get((component, index))
        if waited is not None:
            waited.result()
        return builder.artifact(block)

    def _begin(self) -> None:
        """Start what may run now."""
        with self._lock:
            while self._waiting and self._failed is None and len(self._running) < self._jobs:
                used = sum(t.needed_bytes for t in self._running)
                task = next((t for t in self._waiting if used + t.needed_bytes <= self._free_bytes), None)
                if task is None:
                    if self._running:
                        return
                    task = self._waiting[0]  # too large for what is free: try it alone
                self._waiting.remove(task)
                future = self._pool.submit(_run, task)
                self._running[task] = future
                future.add_done_callback(lambda f, task=task: self._finished(task, f))  # type: ignore[misc]

    def _finished(self, task: Task, future: Future[None]) -> None:
        with self._lock:
            self._running.pop(task, None)
            if future.cancelled():
                return
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                error = ResourceError(
                    f"{task.component}: a process that built it was killed, as happens when memory is short; "
                    "use fewer --jobs, or cut smaller blocks (partition: {max_bytes: …})"
                )
            if error is not None:
                self._failed = self._failed or error
                for waiting in self._done.values():
                    if not waiting.done():
                        waiting.set_exception(self._failed)
                return
            builder = self._builders[task.component]
            if task.template:
                key = (task.component, builder.template_key(builder.lowering.blocks[task.index]))
                self._waiting += self._after.pop(key)
            else:
                self._done[task.component, task.index].set_result(None)
            self._begin()


# --- in the other process ------------------------------------------------------------------------------

_own: dict[str, Any] = {}


def _start(recipe: str, base: str, root: str, direct: bool) -> None:
    return_large_allocations()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it and stops this one
    _own["arguments"] = Recipe.model_validate_json(recipe), Path(base), Store(Path(root)), direct


def _run(task: Task) -> None:
    recipe, base, store, direct = _own["arguments"]
    if "builders" not in _own:
        _own["builders"] = builders(plan(recipe, base=base), base, store, direct)
    builder: Builder = _own["builders"][task.component]
    block = builder.lowering.blocks[task.index]
    with store.scratch() as scratch:
        tempfile.tempdir = str(scratch)  # converters leave large files behind
        if task.template:
            builder.template(block)
        else:
            builder.artifact(block)


def start(recipe: Recipe, base: Path, made: Mapping[str, Builder], store: Store, jobs: int) -> Serial | Parallel:
    """What builds the artifacts of a plan with ``jobs`` processes."""
    return Serial(made) if jobs == 1 else Parallel(recipe, base, made, store, jobs)
