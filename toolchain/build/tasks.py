"""A piece of a build that any process can do, on any machine that shares the store and the checkpoints.

A task holds nothing but text and numbers; what it makes is handed on through the store.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolchain.build.artifacts import Builder
from toolchain.build.calibration import calibrate
from toolchain.build.gating import gate_key, run_gate
from toolchain.errors import ResourceError
from toolchain.formats.recipe import Recipe
from toolchain.ir.blocks import Block
from toolchain.listener import Listener
from toolchain.planning.plan import Plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.events import Event, What, doing, telling
from toolchain.system.memory import return_large_allocations
from toolchain.system.store import Store
from toolchain.system.temporary import temporary_files_in
from toolchain.weights.checkpoint import absolute_location
from toolchain.weights.digests import tensor_digests

KEPT_BUILDS = 8
"""Of how many builds a process keeps what it has planned: tasks of several take turns in it."""


@dataclass(frozen=True)
class Task:
    """One thing to do: the template of a block's structure, a block's artifact, or a component's passage through the
    gate.
    """

    recipe: str
    """As JSON; it finds its checkpoints from wherever it is read, see :func:`recipe_for_tasks`."""
    base: str
    """The folder of the recipe: absolute."""
    store: str
    """The store's folder: absolute."""
    direct: bool
    """Lower the block by itself instead of stamping it."""
    component: str
    block: str
    """Empty for a gate, which is all blocks'."""
    kind: Literal["template", "artifact", "gate"]
    key: str
    """What the store shall know the result by."""
    needed_bytes: int
    """The memory that it is thought to need."""

    @property
    def what(self) -> str:
        """What it is about, for people."""
        return f"{self.component}/{self.block}" if self.block else self.component


def recipe_for_tasks(recipe: Recipe, base: Path) -> str:
    """A recipe as JSON that means the same in a process with another working folder: its checkpoints are absolute.

    Raises:
        CheckpointError: a checkpoint does not exist.
    """
    return recipe.located(lambda location: absolute_location(location, base)).model_dump_json()


def builders(planned: Plan, store: Store, direct: bool, listener: Listener | None = None) -> dict[str, Builder]:
    """A builder for each component of a plan, of a build that was resolved with its checkpoints.

    Args:
        listener: is told of a calibration, which is done when something is asked for that depends on it.

    Raises:
        CheckpointError: a checkpoint cannot be read.
    """
    found = {}
    for name, plan in planned.components.items():
        digests = tensor_digests(plan.resolved.checkpoint, store, name)
        measure = functools.partial(calibrate, planned, name, store, digests, listener)
        found[name] = Builder(plan, digests, store, direct, measure)
    return found


def run_task(task: Task) -> tuple[Event, ...]:
    """Do what a task asks for, in this process; nothing is done if it is in the store. Gives what was done for it.

    A process does one task at a time, for converters are neither thread- nor fork-safe. It keeps what it has read of
    the last builds for more of their tasks.

    Raises:
        LoweringError: as :meth:`toolchain.build.artifacts.Builder.artifact`.
        AccuracyError: as :func:`toolchain.build.gating.run_gate`.
        ResourceError: this process has other code, tools, configurations or weights than the one that wants the task
            done, so it would make something else.
        RuntimeError: stands for an error that cannot be handed to another process.
    """
    return_large_allocations()
    events: list[Event] = []
    with _with_errors(events), errors_for_others(), telling(events.append, raw=True):
        opened = _prepared(task)
        builder = opened.builders[task.component]
        with builder.store.scratch() as scratch, temporary_files_in(scratch):
            if task.kind == "gate":
                run_gate(opened.planned, builder, task.key)
            elif task.kind == "template":
                builder.template(opened.block(task))
            else:
                builder.artifact(opened.block(task))
    return tuple(events)


def events_of(error: BaseException) -> tuple[Event, ...]:
    """What was done for a task that failed with an error; nothing if its process could not say."""
    return getattr(error, "events", ())


@contextlib.contextmanager
def _with_errors(events: list[Event]) -> Iterator[None]:
    """An error takes what was done until then with it."""
    try:
        yield
    except Exception as e:
        e.events = tuple(events)  # type: ignore[attr-defined]
        raise


@dataclass(frozen=True)
class Opened:
    """What a process keeps of a build."""

    planned: Plan
    builders: Mapping[str, Builder]

    def block(self, task: Task) -> Block:
        """The block that a task is about; raises StopIteration if there is none."""
        return next(b for b in self.builders[task.component].plan.blocks if b.name == task.block)

    def key(self, task: Task) -> str | None:
        """What this process would do for a task; None if there is no such block here."""
        builder = self.builders[task.component]
        if task.kind == "gate":
            return gate_key(self.planned, builder)
        if all(b.name != task.block for b in builder.plan.blocks):
            return None
        block = self.block(task)
        return builder.template_key(block) if task.kind == "template" else builder.artifact_key(block)


def _prepared(task: Task) -> Opened:
    for _ in range(2):
        opened = _opened(task.recipe, task.base, task.store, task.direct)
        if opened.key(task) == task.key:
            return opened
        _opened.cache_clear()  # files may have changed since an earlier build of the same recipe
    raise differs(task.what, "build" if task.block else "execute")


def differs(what: str, does: str) -> ResourceError:
    """The error of a process that would do something else than it was asked for."""
    return ResourceError(
        f"{what}: a process on '{platform.node()}' would {does} something else than was asked for; give every process "
        "the same installation, configurations and checkpoints"
    )


@functools.lru_cache(maxsize=KEPT_BUILDS)
def _opened(recipe: str, base: str, store: str, direct: bool) -> Opened:
    """A build as this process sees it; the last ones are kept."""
    with doing(What("plan")):
        planned = plan_resolved(resolve(Recipe.model_validate_json(recipe), Path(base), checkpoints=True))
    return Opened(planned, builders(planned, Store(Path(store)), direct))


@contextlib.contextmanager
def errors_for_others() -> Iterator[None]:
    """What is raised in it can be handed to another process.

    Raises:
        RuntimeError: stands for an error that cannot.
    """
    try:
        yield
    except Exception as e:
        if _survives_pickling(e):
            raise
        raise RuntimeError(f"{type(e).__name__}: {e}") from None


def _survives_pickling(error: Exception) -> bool:
    """Whether an error can be handed to another process; what cannot be read there takes its executor down."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever its own methods raise
        return False
