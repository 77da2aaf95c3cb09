"""Building artifacts, one after the other in this process, or as tasks that an executor runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from toolchain.build.admission import EXECUTING_FACTOR, LOWERING_FACTOR, STAMPING_FACTOR, Admission, needed_bytes
from toolchain.build.artifacts import Builder
from toolchain.build.cluster import Cluster
from toolchain.build.executors import OwnProcesses, Ways
from toolchain.build.tasks import Task, events_of, recipe_for_tasks, run_task
from toolchain.errors import ResourceError
from toolchain.formats.recipe import Recipe
from toolchain.ir.blocks import Block
from toolchain.listener import Listener
from toolchain.system.events import Event, What, check_cancelled, doing, happened, teller
from toolchain.system.memory import free_bytes
from toolchain.system.store import Entry, Store

CANCELLED_SECONDS = 0.2
"""How often it is asked whether a build is cancelled while other processes work."""


@dataclass(frozen=True)
class Order:
    """What a build asks for."""

    recipe: Recipe
    base: Path
    builders: Mapping[str, Builder]
    """By component."""
    gates: Mapping[str, str] = field(default_factory=dict)
    """Keys of the components' passages through the gate (:func:`toolchain.build.gating.gate_key`), for those that are
    to be tasks too."""
    name: str = ""
    """Of the build, among several."""


class Serial:
    """Builds an artifact in this process when it is asked for."""

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def artifact(self, builder: Builder, block: Block) -> Entry:
        """The block's artifact.

        Raises:
            LoweringError: as :meth:`toolchain.build.artifacts.Builder.artifact`.
        """
        return builder.artifact(block)

    def gate(self, key: str | None) -> None:
        """Nothing was begun that could be waited for."""


def artifact_source(
    orders: Sequence[Order],
    store: Store,
    ways: Ways,
    executor: Executor | None,
    listener: Listener | None = None,
    keep_going: bool = False,
) -> Serial | Parallel:
    """What makes what builds ask for: this process, ``executor``, or processes of our own."""
    if ways.serial(executor):
        return Serial()
    if executor is None:
        runner: Executor = OwnProcesses(ways.jobs)
        admission, most_bytes = Admission(ways.memory_bytes or free_bytes(), ways.jobs), ways.memory_bytes
    else:
        runner, admission = executor, Admission(at_once=ways.tasks_at_once)
        most_bytes = executor.most_bytes if isinstance(executor, Cluster) else None
    return Parallel(orders, store, runner, admission, most_bytes=most_bytes, listener=listener, keep_going=keep_going)


class ElsewhereError(Exception):
    """Stands for what another build failed of, where a build was not gone on with for that reason."""

    def __init__(self, build: str, error: BaseException) -> None:
        super().__init__(f"{build}: {error}")
        self.build, self.error = build, error


@dataclass(eq=False)
class _Node:
    """A task, what it waits for, and who waits for it."""

    task: Task
    build: str
    """The first that asked for it."""
    parameters: int
    """Of the largest block that it is about."""
    needs: set[_Node] = field(default_factory=set)
    needed_by: list[_Node] = field(default_factory=list)
    done: Future[None] = field(default_factory=Future)

    @property
    def needed_bytes(self) -> int:
        return self.task.needed_bytes

    @property
    def told(self) -> What:
        """What who hears of the build is told that it is."""
        return What(self.task.kind, self.task.component, self.task.block)


class Parallel:
    """Has what builds need made by an executor: templates first, then each block's artifact as its template is there,
    then a component's passage through the gate as its artifacts are. What several builds need is made once.

    Leaving the context stops :class:`OwnProcesses`. Another executor is its owner's: only what was not begun is
    cancelled there.

    Args:
        admission: decides how much is handed to the executor at once.
        most_bytes: what a task may need of memory; no limit if None.
        listener: is told how many tasks there are and how many are done, in the executor's threads.
        keep_going: when a task fails, only what needs it fails with it; everything otherwise.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        store: Store,
        executor: Executor,
        admission: Admission,
        *,
        most_bytes: int | None = None,
        listener: Listener | None = None,
        keep_going: bool = False,
    ) -> None:
        self._store, self._executor, self._admission = store, executor, admission
        self._orders, self._listener, self._most_bytes = orders, listener or Listener(), most_bytes
        self._keep_going = keep_going
        self._tell = teller()
        self._lock = threading.RLock()
        """Of everything below, which the executor's threads change as well. Not held while a task is submitted."""
        self._nodes: dict[tuple[str, str], _Node] = {}
        """By kind and key."""
        self._cached: set[tuple[str, str]] = set()
        """What is in the store already, likewise."""
        self._waiting: list[_Node] = []
        self._running: dict[_Node, Future[tuple[Event, ...]] | None] = {}
        self._ended_tasks = 0
        self._failed: _Node | None = None
        self._submitting = self._leaving = False

    def __enter__(self) -> Parallel:
        """Line everything up.

        Raises:
            ResourceError: a task needs more memory than it may.
        """
        with self._lock:
            for order in self._orders:
                self._line_up(order)
            self._waiting = [node for node in self._nodes.values() if not node.needs]
            self._waiting.sort(key=lambda node: node.task.kind != "template")
            for node in self._nodes.values():
                self._check_memory(node.task)
            self._listener.lined_up(len(self._nodes), len(self._cached))
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

    def artifact(self, builder: Builder, block: Block) -> Entry:
        """The block's artifact, once it is built.

        Raises:
            LoweringError: as :meth:`toolchain.build.artifacts.Builder.artifact`.
            ResourceError: a process was killed, as it is when memory is short, or the executor was shut down.
            ElsewhereError: another build failed.
        """
        self._wait("artifact", builder.artifact_key(block))
        return builder.artifact(block)

    def gate(self, key: str | None) -> None:
        """Wait until the results of a component's passage through the gate are in the store, if it is a task.

        Raises:
            AccuracyError: as :func:`toolchain.build.gating.run_gate`; and as :meth:`artifact`.
        """
        if key is not None:
            self._wait("gate", key)

    def _wait(self, kind: str, key: str) -> None:
        node = self._nodes.get((kind, key))
        if node is None:
            return
        if not node.done.done():
            with doing(What("wait", node.task.component, node.task.block)):
                while wait([node.done], CANCELLED_SECONDS).not_done:
                    check_cancelled()
        node.done.result()

    # --- lining up ---------------------------------------------------------------------------------------

    def _line_up(self, order: Order) -> None:
        places = recipe_for_tasks(order.recipe, order.base), os.path.abspath(order.base), str(self._store.root)

        def node(component: str, block: str, kind: str, key: str, parameters: int, factor: int) -> _Node:
            direct, needed = order.builders[component].direct, needed_bytes(parameters, factor)
            task = Task(*places, direct, component, block, kind, key, needed)  # type: ignore[arg-type]
            return _Node(task, order.name, parameters)

        for component, builder in order.builders.items():
            artifacts = []
            for block in builder.plan.blocks:
                made = functools.partial(node, component, block.name, parameters=block.parameters)
                key, template = builder.artifact_key(block), builder.template_key(block)
                if self._is_there("artifacts", "artifact", key):
                    continue
                lowers = builder.direct or self._unbound(template)
                factor = LOWERING_FACTOR if lowers else STAMPING_FACTOR
                artifact = self._add(made("artifact", key, factor=factor))
                if not builder.direct and not self._is_there("templates", "template", template):
                    self._depends(artifact, self._add(made("template", template, factor=LOWERING_FACTOR)))
                artifacts.append(artifact)
            if component in order.gates and not self._is_there("gates", "gate", order.gates[component]):
                largest = max(block.parameters for block in builder.plan.blocks)
                gate = self._add(node(component, "", "gate", order.gates[component], largest, EXECUTING_FACTOR))
                for artifact in artifacts:
                    self._depends(gate, artifact)

    def _is_there(self, entries: str, kind: str, key: str) -> bool:
        """Whether something is in the store; it is looked at once."""
        place = kind, key
        if place not in self._cached and place not in self._nodes and self._store.get(entries, key) is not None:
            self._cached.add(place)
        return place in self._cached

    def _add(self, node: _Node) -> _Node:
        """The node, or the one that is there already for the same."""
        return self._nodes.setdefault((node.task.kind, node.task.key), node)

    def _depends(self, node: _Node, other: _Node) -> None:
        if other not in node.needs:
            node.needs.add(other)
            other.needed_by.append(node)

    def _unbound(self, template: str) -> bool:
        entry = self._store.get("templates", template)
        return entry is not None and bool(entry.meta.get("unbound"))

    def _check_memory(self, task: Task) -> None:
        if self._most_bytes is not None and task.needed_bytes > self._most_bytes:
            raise ResourceError(
                f"{task.what}: needs about {task.needed_bytes / 1e9:.1f} GB of memory and may have "
                f"{self._most_bytes / 1e9:.1f} GB; give processes more, or cut smaller blocks (partition: "
                "{max_bytes: …})"
            )

    # --- handing out -------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Hand over what may run now."""
        with self._lock:
            if self._submitting:  # further up, where an executor runs a task as it is handed over, or in another thread
                return
            self._submitting = True
        while (node := self._next()) is not None:
            self._tell(happened("given", node.told, node.task.key))
            try:
                future = self._executor.submit(run_task, node.task)
            except Exception as e:  # it was shut down, or is broken
                self._ended(node)
                self._fail(node, e)
            else:
                with self._lock:
                    self._running[node] = future
                future.add_done_callback(functools.partial(self._finished, node))

    def _next(self) -> _Node | None:
        with self._lock:
            node = None if self._failed is not None or self._leaving else self._admission.next(self._waiting)
            if node is None:
                self._submitting = False
            else:
                self._waiting.remove(node)
                self._running[node] = None
            return node

    def _ended(self, node: _Node) -> None:
        with self._lock:
            self._running.pop(node, None)
            self._admission.ended(node)

    def _finished(self, node: _Node, future: Future[tuple[Event, ...]]) -> None:
        """Called in whatever thread of the executor's: what is raised here, nobody would hear of."""
        try:
            if future.cancelled():
                raise ResourceError(f"{node.task.what}: the executor was shut down before it was built")
            error = future.exception()
            if error is not None:
                raise error
            for event in future.result():
                self._tell(event)
            with self._lock:
                if not (self._failed or self._leaving):
                    self._go_on(node)
        except BaseException as e:
            self._fail(node, e)
        self._ended(node)
        self._submit()

    def _go_on(self, node: _Node) -> None:
        """Line up what waited for a task, and tell who did."""
        lowers = node.task.kind == "template" and self._unbound(node.task.key)
        for other in node.needed_by:
            if lowers:
                needed = needed_bytes(other.parameters, LOWERING_FACTOR)
                other.task = dataclasses.replace(other.task, needed_bytes=needed)
            other.needs.discard(node)
            if not other.needs and not other.done.done():
                self._waiting.append(other)
        node.done.set_result(None)
        self._ended_tasks += 1
        self._listener.task_done(self._ended_tasks, len(self._nodes))

    def _fail(self, node: _Node, error: BaseException) -> None:
        """Nobody waits any longer for what needs it, or for anything."""
        broken = isinstance(error, BrokenExecutor)
        with self._lock:
            events = events_of(error)
            error = self._explained(error, node)
            for event in events or [happened("failed", node.told, node.task.key, error)]:
                self._tell(event)
            if self._keep_going and not broken:
                self._give_up(_all_that_need(node), node, error)
            else:
                self._failed = self._failed or node
                self._give_up(self._nodes.values(), node, error)

    def _give_up(self, nodes: Iterable[_Node], failed: _Node, error: BaseException) -> None:
        related = set(_all_that_need(failed))
        for node in nodes:
            if not node.done.done():
                same = node in related or node.build == failed.build
                node.done.set_exception(error if same else ElsewhereError(failed.build, error))

    def _explained(self, error: BaseException, node: _Node) -> BaseException:
        """What an executor raised, for users."""
        if isinstance(error, BrokenExecutor):
            if self._leaving:
                return ResourceError(f"{node.task.what}: not built, since the build was stopped")
            names = ", ".join(sorted({n.task.what for n in (*self._running, node)}))
            return ResourceError(
                f"{names}: a process that built {'it' if ',' not in names else 'one of these'} was killed, as happens "
                "when memory is short; use fewer --jobs, or cut smaller blocks (partition: {max_bytes: …})"
            )
        return error


def _all_that_need(node: _Node) -> list[_Node]:
    """A node and all that wait for it, at any distance."""
    found = [node]
    for other in found:
        found += [n for n in other.needed_by if n not in found]
    return found
