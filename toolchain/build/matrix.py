"""Many builds with one pool of tasks: all are planned first, and what several need is made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.build.cluster import admitted
from toolchain.build.compile import UNCHANGED
from toolchain.build.executors import Ways, executor_of
from toolchain.build.making import Draft, disk_full_explained, draft, finish
from toolchain.build.parallel import ElsewhereError, Parallel, Serial, artifact_source
from toolchain.errors import SoraCompileError, interrupted
from toolchain.formats.bundle import Bundle, prepare
from toolchain.formats.matrix import MatrixBuild, load_matrix
from toolchain.listener import Listener
from toolchain.planning.budgets import budgets_of
from toolchain.system.events import What, doing, telling
from toolchain.system.memory import return_large_allocations
from toolchain.system.store import Store


@dataclass(frozen=True)
class Outcome:
    """What became of one build: its bundle, or the error that it failed of."""

    name: str
    choices: Mapping[str, str]
    out: Path
    bundle: Bundle | None = None
    error: Exception | None = None


def build_all(
    matrix: str | Path,
    *,
    listener: Listener | None = None,
    jobs: int = 1,
    executor: Executor | str | None = None,
    memory_bytes: int | None = None,
    store: Store | None = None,
    changes: Mapping[str, Any] | None = None,
    keep_going: bool = False,
) -> list[Outcome]:
    """Make every build of the matrix in a file (:mod:`toolchain.formats.matrix`), each as
    :func:`toolchain.build.compile.compile_recipe` would alone, byte for byte.

    All are planned before anything is built. Bundles appear one by one, each whole; those that are done stay when
    another fails.

    Args:
        changes: keys that are set in every recipe, such as ``{"gate.mode": "structure"}``.
        keep_going: when a build fails, the others are made nevertheless, and its outcome says of what.

    Raises:
        SoraCompileError: a build cannot be made, of whatever kind its error is; names it. With ``keep_going`` only
            for what is found before anything is built.
    """
    listener, store = listener or Listener(), store or Store()
    with telling(listener.event, cancelled=listener.cancelled), doing(What("builds")):
        return _build_all(matrix, listener, jobs, executor, memory_bytes, store, changes, keep_going)


def _build_all(
    matrix: str | Path,
    listener: Listener,
    jobs: int,
    executor: Executor | str | None,
    memory_bytes: int | None,
    store: Store,
    changes: Mapping[str, Any] | None,
    keep_going: bool,
) -> list[Outcome]:
    return_large_allocations()
    ways = Ways(jobs, memory_bytes=memory_bytes)
    ways.check(executor)
    builds = load_matrix(matrix, changes)
    for build in builds:
        prepare(build.out)
    with executor_of(executor, jobs) as runner, admitted(runner, [b.recipe for b in builds], store):
        drafts = _drafts(builds, store, listener, ways, runner)
        orders = [found.order(name) for name, found in drafts.items() if isinstance(found, Draft)]
        outcomes: list[Outcome] = []
        with artifact_source(orders, store, ways, runner, listener, keep_going) as source:
            for build in builds:
                listener.build(build.name, len(outcomes) + 1, len(builds))
                outcome = _outcome(build, drafts.pop(build.name), source, store, listener)
                listener.built(build.name, outcome.error)
                outcomes.append(outcome)
                if outcome.error is not None and not keep_going:
                    raise outcome.error
    store.evict()
    return outcomes


def _drafts(
    builds: Sequence[MatrixBuild], store: Store, listener: Listener, ways: Ways, runner: Executor | None
) -> dict[str, Draft | Bundle]:
    """Every build's plan, by its name; those whose budgets have to be settled first, which takes longer, come last."""
    found: dict[str, Draft | Bundle] = {}
    for build in sorted(builds, key=lambda b: bool(budgets_of(b.recipe))):
        try:
            found[build.name] = draft(build.recipe, build.out, build.base, store, listener, False, ways, runner)
        except SoraCompileError as e:
            raise _named(e, build.name) from e
    return found


def _outcome(
    build: MatrixBuild, found: Draft | Bundle, source: Serial | Parallel, store: Store, listener: Listener
) -> Outcome:
    if isinstance(found, Bundle):
        listener.remark(f"{build.name}: {UNCHANGED}")
        return Outcome(build.name, build.choices, build.out, found)
    try:
        with doing(What("build", build=build.name)), disk_full_explained(found.planned, store, build.out):
            return Outcome(build.name, build.choices, build.out, finish(found, source, store, listener))
    except ElsewhereError as e:
        error = _named(e.error, e.build) if isinstance(e.error, Exception) else e
    except Exception as e:
        if interrupted(e):
            raise
        error = _named(e, build.name)
    return Outcome(build.name, build.choices, build.out, error=error)


def _named(error: Exception, build: str) -> Exception:
    """An error that says of which build it is."""
    if not isinstance(error, SoraCompileError):
        return error
    named = type(error)(f"{build}: {error}")
    named.__cause__ = error
    return named
