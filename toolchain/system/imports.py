"""Code, read without running it: what a file imports, and where a class is defined."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@functools.cache
def imports_of(source: bytes, package: tuple[str, ...]) -> frozenset[str]:
    """Absolute names of what a file imports; of ``from a import b`` both ``a`` and ``a.b``, which may be a module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return frozenset()  # not meant to be run: a template, code for another version of Python
    names: set[str] = set()
    for statement in _statements(tree):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            if statement.level > len(package):
                continue  # leads out of its package, which Python refuses
            origin = _origin(statement, package)
            names |= {origin, *(f"{origin}.{alias.name}" for alias in statement.names)}
    return frozenset(names)


@functools.cache
def defined_in(module: str, name: str) -> str | None:
    """The module whose file has the class that ``module`` has as ``name``, found by reading; it is not imported.

    Packages around the module are. None where reading does not tell: the name is bound more than once, only on some
    condition, or to something else than a class.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    seen: set[str] = set()
    while module not in seen:
        seen.add(module)
        file = file_of(module)
        if file is None or file.suffix != ".py" or not file.is_file():
            return None
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return None
        found = [s for s in _statements(tree) if _binds(s, name)]
        if len(found) != 1 or found[0] not in tree.body:
            return None
        if isinstance(found[0], ast.ClassDef):
            return module if not found[0].decorator_list else None
        if not isinstance(found[0], ast.ImportFrom):
            return None
        package = tuple(module.split(".") if file.name == "__init__.py" else module.split(".")[:-1])
        name = next((a.name for a in found[0].names if (a.asname or a.name) == name), "")
        module = _origin(found[0], package)
    return None


def file_of(module: str) -> Path | None:
    """The file of a module that can be imported; None for a namespace package and what is built into Python.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    loaded = sys.modules.get(module)
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        return Path(file).absolute() if file else None
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"no module named '{module}'", name=module)
    return Path(spec.origin).absolute() if spec.has_location and spec.origin else None


def _origin(statement: ast.ImportFrom, package: tuple[str, ...]) -> str:
    """The absolute name of the module that a statement in ``package`` imports from."""
    around = package[: len(package) - statement.level + 1] if statement.level else ()
    return ".".join([*around, *([statement.module] if statement.module else [])])


def _binds(statement: ast.stmt, name: str) -> bool:
    """Whether a statement gives ``name`` a value, or may do so."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return any((alias.asname or alias.name.partition(".")[0]) in (name, "*") for alias in statement.names)
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return statement.name == name
    stored = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return any(n.id == name for n in stored)


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements, however deep, except what only type checkers read."""
    left: list[Any] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.stmt):
            yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            if not (part == "body" and isinstance(node, ast.If) and _only_for_types(node.test)):
                left += getattr(node, part, ())


def _only_for_types(test: ast.expr) -> bool:
    return (test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")) == "TYPE_CHECKING"
