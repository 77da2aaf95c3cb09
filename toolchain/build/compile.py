"""Recipe → bundle: the one that is there, if nothing has changed; or else one is made. Only that needs torch."""

from __future__ import annotations

import functools
from concurrent.futures import Executor
from pathlib import Path

from toolchain.build.executors import Ways
from toolchain.build.keys import build_key
from toolchain.errors import SoraCompileError
from toolchain.formats import manifest as m
from toolchain.formats.bundle import Bundle, load_bundle, prepare
from toolchain.formats.recipe import Recipe
from toolchain.formats.times import TimesFile, load_times
from toolchain.listener import Listener
from toolchain.planning.budgets import budgets_of
from toolchain.planning.resolve import resolve_lightly
from toolchain.system.events import What, cached, doing, telling
from toolchain.system.memory import return_large_allocations
from toolchain.system.store import Store, digest
from toolchain.weights.digests import are_remembered

UNCHANGED = "nothing has changed since this bundle was built"


def compile_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | Path | None = None,
    listener: Listener | None = None,
    direct: bool = False,
    jobs: int = 1,
    executor: Executor | str | None = None,
    tasks_at_once: int | None = None,
    memory_bytes: int | None = None,
    store: Store | None = None,
    calibration: str | Path | None = None,
) -> Bundle:
    """Build ``recipe`` into the bundle ``out``.

    What was built before is taken from the store: a build that was stopped goes on where it was, and one of which
    nothing has changed is not repeated.

    Args:
        out: the bundle's folder. It appears whole or not at all; an older bundle there is replaced.
        base: folder that relative checkpoint paths are looked for in first.
        listener: is told of progress.
        direct: lower every block by itself instead of stamping those that share a structure.
        jobs: how many processes build at once, as far as the memory allows.
        executor: runs the tasks of the build (:func:`toolchain.build.tasks.run_task`) instead of processes of our
            own, so that ``jobs`` means nothing. It may have processes anywhere, on machines that share the store, the
            checkpoints and this installation by the same paths. An executor of threads must have a single one. It is
            not shut down. Or ``dask://HOST:PORT``, the address of a cluster's scheduler.
        tasks_at_once: how many tasks are handed to ``executor`` before others are done; all that can be done if None.
        memory_bytes: what all ``jobs`` may use together; what is free if None.
        store: where templates, artifacts and gate results are kept; the user's cache folder if None.
        calibration: a file of measured times to plan loading with, instead of those of the device's profile.

    Raises:
        SoraCompileError: says what, where and what to do; ``exit_code`` is the command's.
        CancelledError: ``listener`` said so.
    """
    listener, store, out, base = listener or Listener(), store or Store(), Path(out), Path(base or ".")
    with telling(listener.event, cancelled=listener.cancelled), doing(What("build", build=recipe.name)):
        return_large_allocations()
        ways = Ways(jobs, tasks_at_once, memory_bytes)
        ways.check(executor)
        prepare(out)
        measured = None if calibration is None else load_times(Path(calibration))
        done = unchanged(recipe, out, base, store, direct, measured)
        if done is not None:
            listener.remark(UNCHANGED)
            return done
        from toolchain.build.making import make_bundle

        return make_bundle(recipe, out, base, store, listener, direct, ways, executor, measured)


def unchanged(
    recipe: Recipe, out: Path, base: Path, store: Store, direct: bool, measured: TimesFile | None
) -> Bundle | None:
    """The bundle at ``out`` if it is known, without torch and without reading a tensor, that nothing has changed."""
    if budgets_of(recipe) or not (out / m.FILE_NAME).is_file():
        return None
    build = resolve_lightly(recipe, base)
    if not all(are_remembered(part.checkpoint, store) for part in build.components.values()):
        return None
    return up_to_date(out, build_key(build, store, direct, measured), store)


def up_to_date(out: Path, key: str, store: Store) -> Bundle | None:
    """The bundle at ``out`` if it is what the build of ``key`` made, byte for byte."""
    built = store.get("builds", key)
    if built is None:
        return None
    try:
        if (out / m.FILE_NAME).read_text(encoding="utf-8") != built.meta["manifest"]:
            return None
        bundle = load_bundle(out)
        for file in bundle.files():
            path = out / file.path
            if store.remembered(path, functools.partial(digest, path)) != file.sha256:
                return None
    except (OSError, UnicodeDecodeError, SoraCompileError):
        return None
    cached(What("bundle"), key)
    return bundle
