"""What a process elsewhere must have in common with this one before it is given work, as it says itself."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import plugins
from toolchain.errors import ResourceError
from toolchain.formats.recipe import Recipe
from toolchain.ir.target import Target, package_versions
from toolchain.system.code import code_digest
from toolchain.version import VERSION

TOKEN_FILE, TASKS = "token", ("toolchain.build.tasks", "toolchain.build.sweep_tasks")


@dataclass(frozen=True)
class Expected:
    """What this process has; texts only. ``folder`` is one of the store's, for as long as work is given."""

    store: str
    folder: str
    token: str
    targets: tuple[str, ...]
    modules: tuple[str, ...]
    """Of plug-ins, besides our own."""
    versions: tuple[tuple[str, str], ...]
    code: str


def expected(recipes: Iterable[Recipe], store: Path, folder: Path) -> Expected:
    """What a process needs for the builds of ``recipes``; leaves a token in ``folder`` that it has to find."""
    recipes = list(recipes)
    targets = tuple(sorted({recipe.target.name for recipe in recipes}))
    modules = {_module(plugins.MODELS, r.model, "model") for r in recipes}
    modules |= {_module(plugins.TARGETS, name, "target") for name in targets}
    passes = {spec.name for r in recipes for part in r.components().values() for spec in part.passes}
    modules |= {_module(plugins.PASSES, name, "pass") for name in passes}
    token, own = secrets.token_hex(16), tuple(sorted(modules))
    (folder / TOKEN_FILE).write_text(token, encoding="ascii")
    code = code_digest(*TASKS, *own)
    return Expected(str(store), str(folder), token, targets, own, tuple(versions(targets).items()), code)


def _module(group: str, name: str, what: str) -> str:
    module: str = plugins.find(group, name, what, what).__module__
    return module


def versions(targets: Iterable[str]) -> dict[str, str]:
    """Versions of what decides the bytes of artifacts for targets: ours, Python's, their tools'."""
    found = {"sora-compile": VERSION, "Python": platform.python_version()} | package_versions("torch")
    for name in targets:
        target: Target = plugins.configured(plugins.find(plugins.TARGETS, name, "target", "target"), {}, "target")
        found |= target.versions()
    return found


def differences(wanted: Expected, answer: str) -> list[str]:
    """What this process has otherwise than ``wanted``; nothing if it may be given work.

    Args:
        answer: name of a file that it writes beside the token, with the same in it.
    """
    try:
        own = versions(wanted.targets)
        found = [f"has {k} {own.get(k, 'not at all')}, not {v}" for k, v in wanted.versions if own.get(k) != v]
        if not found and code_digest(*TASKS, *wanted.modules) != wanted.code:
            found = ["has sora-compile or a plug-in of the same version with other code"]
    except Exception as e:  # a package or a plug-in that is not there, or does not load
        found = [f"cannot load what builds need ({type(e).__name__}: {' '.join(str(e).split())})"]
    return found + _store_differences(wanted, answer)


def _store_differences(wanted: Expected, answer: str) -> list[str]:
    try:
        if (Path(wanted.folder) / TOKEN_FILE).read_text(encoding="ascii") != wanted.token:
            return [f"sees another store at '{wanted.store}'"]
    except (OSError, UnicodeDecodeError) as e:
        return [f"does not see the store '{wanted.store}' ({_reason(e)}); set SORA_COMPILE_CACHE to a folder all share"]
    try:
        (Path(wanted.folder) / answer).write_text(wanted.token, encoding="ascii")
    except OSError as e:
        return [f"cannot write to the store '{wanted.store}' ({_reason(e)})"]
    return []


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


_fit: set[str] = set()
"""Tokens of builds that this process may work for."""


def run_if_fit(wanted: Expected, worker: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, in a process that was asked once whether it may; later ones join a cluster unasked.

    Raises:
        ResourceError: it may not; names it and what differs.
    """
    if wanted.token not in _fit:
        if found := differences(wanted, f"late-{secrets.token_hex(8)}"):
            raise unfit(worker, found)
        _fit.add(wanted.token)
    return function(*args)


def unfit(worker: str, found: Iterable[str]) -> ResourceError:
    """The error of a process that cannot be given work."""
    return ResourceError(f"worker '{worker}' {', '.join(found)}; give every worker the same installation and store")
