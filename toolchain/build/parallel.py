"""Building artifacts, one after the other in this process, or as tasks that an executor runs.

Converters are neither thread- nor fork-safe, so an executor of our own has processes, and spawns them.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Literal

from toolchain.build.admission import Admission, needed_bytes
from toolchain.build.artifacts import Builder
from toolchain.build.tasks import Task, recipe_for_tasks, run_task
from toolchain.errors import ResourceError
from toolchain.formats.recipe import Recipe
from toolchain.ir.blocks import Block
from toolchain.system.memory import free_bytes
from toolchain.system.store import Entry, Store


def artifact_source(
    recipe: Recipe,
    base: Path,
    builders: Mapping[str, Builder],
    store: Store,
    jobs: int,
    executor: Executor | None = None,
    tasks_at_once: int | None = None,
) -> Serial | Parallel:
    """What builds the artifacts of a recipe, as its arguments to :func:`toolchain.build.compile.compile_recipe` say."""
    if executor is None and jobs == 1:
        return Serial(builders)
    if executor is None:
        return Parallel(recipe, base, builders, store, OwnProcesses(jobs), Admission(free_bytes(), jobs))
    return Parallel(recipe, base, builders, store, executor, Admission(at_once=tasks_at_once))


class Serial:
    """Builds an artifact in this process when it is asked for."""

    def __init__(self, builders: Mapping[str, Builder]) -> None:
        self._builders = builders

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


class OwnProcesses(ProcessPoolExecutor):
    """Spawned processes that only the first process interrupts."""

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs, get_context("spawn"), initializer=_ignore_interrupts)

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        for process in list((self._processes or {}).values()):
            process.kill()
        self.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it and stops this one


class Parallel:
    """Has artifacts built by an executor: all templates first, then each block's as its template is there.

    Leaving the context stops :class:`OwnProcesses`. Another executor is its owner's: only what was not begun is
    cancelled there.

    Args:
        admission: decides how much is handed to the executor at once.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Path,
        builders: Mapping[str, Builder],
        store: Store,
        executor: Executor,
        admission: Admission,
    ) -> None:
        self._builders, self._store, self._executor, self._admission = builders, store, executor, admission
        self._recipe, self._base = recipe_for_tasks(recipe, base), os.path.abspath(base)
        self._lock = threading.RLock()
        """Of everything below, which the executor's threads change as well. Not held while a task is submitted."""
        self._waiting: list[Task] = []
        self._running: dict[Task, Future[None] | None] = {}
        self._after: dict[tuple[str, str], list[Block]] = {}
        """Blocks that wait for a template, by component and the template's key."""
        self._done: dict[tuple[str, str], Future[None]] = {}
        """By component and block."""
        self._failed: BaseException | None = None
        self._submitting = self._leaving = False

    def __enter__(self) -> Parallel:
        with self._lock:
            for component, builder in self._builders.items():
                for block in builder.plan.blocks:
                    if self._store.get("artifacts", builder.artifact_key(block)) is None:
                        self._done[component, block.name] = Future()
                        self._plan(component, block)
            self._waiting.sort(key=lambda task: task.kind != "template")
        self._submit()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._leaving = True
            self._waiting.clear()
            left = [future for future in self._running.values() if future is not None]
        if not isinstance(self._executor, OwnProcesses):
            for future in left:
                future.cancel()
        elif error is None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        else:
            self._executor.kill()
        self._store.remove_abandoned()

    def artifact(self, component: str, block: Block) -> Entry:
        """The block's artifact, once it is built.

        Raises:
            LoweringError: as :meth:`toolchain.build.artifacts.Builder.artifact`.
            ResourceError: a process was killed, as it is when memory is short, or the executor was shut down.
        """
        waited = self._done.get((component, block.name))
        if waited is not None:
            waited.result()
        return self._builders[component].artifact(block)

    def _plan(self, component: str, block: Block) -> None:
        """Line up what builds a block's artifact."""
        builder = self._builders[component]
        key = builder.template_key(block)
        template = self._store.get("templates", key)
        if builder.direct or template is not None:
            self._waiting.append(self._artifact_task(component, block, template))
        elif (component, key) in self._after:
            self._after[component, key].append(block)
        else:
            self._after[component, key] = [block]
            self._waiting.append(self._task("template", component, block, key, lowers=True))

    def _artifact_task(self, component: str, block: Block, template: Entry | None) -> Task:
        builder = self._builders[component]
        lowers = builder.direct or (template is not None and bool(template.meta.get("unbound")))
        return self._task("artifact", component, block, builder.artifact_key(block), lowers)

    def _task(
        self, kind: Literal["template", "artifact"], component: str, block: Block, key: str, lowers: bool
    ) -> Task:
        direct, needed = self._builders[component].direct, needed_bytes(block.parameters, lowers)
        store = str(self._store.root)
        return Task(self._recipe, self._base, store, direct, component, block.name, kind, key, needed)

    def _submit(self) -> None:
        """Hand over what may run now."""
        with self._lock:
            if self._submitting:  # further up, where an executor runs a task as it is handed over, or in another thread
                return
            self._submitting = True
        while (task := self._next()) is not None:
            try:
                future = self._executor.submit(run_task, task)
            except Exception as e:  # it was shut down, or is broken
                self._ended(task)
                self._fail(self._explained(e, task))
            else:
                with self._lock:
                    self._running[task] = future
                future.add_done_callback(functools.partial(self._finished, task))

    def _next(self) -> Task | None:
        with self._lock:
            task = None if self._failed is not None or self._leaving else self._admission.next(self._waiting)
            if task is None:
                self._submitting = False
            else:
                self._waiting.remove(task)
                self._running[task] = None
            return task

    def _ended(self, task: Task) -> None:
        with self._lock:
            self._running.pop(task, None)
            self._admission.ended(task)

    def _finished(self, task: Task, future: Future[None]) -> None:
        """Called in whatever thread of the executor's: what is raised here, nobody would hear of."""
        try:
            if future.cancelled():
                raise ResourceError(f"{task.component}/{task.block}: the executor was shut down before it was built")
            error = future.exception()
            if error is not None:
                raise self._explained(error, task)
            with self._lock:
                if not (self._failed or self._leaving):
                    self._go_on(task)
        except BaseException as e:
            self._fail(e)
        self._ended(task)
        self._submit()

    def _go_on(self, task: Task) -> None:
        """Line up what waited for a task, or tell who did."""
        if task.kind == "artifact":
            self._done[task.component, task.block].set_result(None)
            return
        template = self._store.get("templates", task.key)
        blocks = self._after.pop((task.component, task.key))
        self._waiting += [self._artifact_task(task.component, block, template) for block in blocks]

    def _fail(self, error: BaseException) -> None:
        """Nothing more is begun, and nobody waits any longer."""
        with self._lock:
            self._failed = self._failed or error
            for waiting in self._done.values():
                if not waiting.done():
                    waiting.set_exception(self._failed)

    def _explained(self, error: BaseException, task: Task) -> BaseException:
        """What an executor raised, for users."""
        if isinstance(error, BrokenExecutor):
            with self._lock:
                names = ", ".join(sorted({f"{t.component}/{t.block}" for t in (*self._running, task)}))
            return ResourceError(
                f"{names}: a process that built {'it' if ',' not in names else 'one of these'} was killed, as happens "
                "when memory is short; use fewer --jobs, or cut smaller blocks (partition: {max_bytes: …})"
            )
        return error
