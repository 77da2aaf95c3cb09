"""Digests of code: what is built depends on the code that builds it, so its key holds one.

Code is followed by reading it, without running it: from a module to all that it imports, wherever in it the import
stands, except under ``if TYPE_CHECKING``. What is imported by a computed name is not seen. Libraries from elsewhere
are no part of it; their versions are the keys' business (:meth:`toolchain.ir.target.Target.versions`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import all_suffixes
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

OWN_PACKAGES = ("toolchain", "passes", "targets", "recipes")
PLUGIN_PACKAGES = ("targets", "passes")
"""Those of ours in which a package is a plug-in: all of its files count, whether or not something imports them."""
COMPILED = ("__pycache__", ".pyc", ".pyo")


@functools.cache
def code_digest(*modules: str) -> str:
    """sha256, in hex, of the code that modules consist of and depend on; remembered while the process lives.

    Of our own packages, that is each module's file and those of ours that it imports, directly or not; and all the
    files of a target's or a pass's own package. Of a plug-in it is its whole top-level package, or its single file,
    with what lies beside it and is imported, and what it imports of ours.

    Args:
        modules: dotted names, of modules that can be imported.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    return digest_of_code(Path(__file__).parents[2], *modules)


def digest_of_code(root: Path, *modules: str) -> str:
    """As :func:`code_digest`, with our own packages in the folder ``root``; nothing is remembered."""
    found = _Closure(root)
    for module in modules:
        found.add_root(module)
    whole = hashlib.sha256()
    for name, content in sorted(found.files.items()):
        whole.update(f"{len(name.encode())} {len(content)}\n{name}".encode())
        whole.update(content)
    return whole.hexdigest()


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
        file = _file_of(module)
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


class _Closure:
    """What modules depend on: the content of ``files``, by names that are the same wherever they are installed."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, bytes] = {}
        self._root = root

    def add_root(self, module: str) -> None:
        parts = module.split(".")
        if parts[0] not in OWN_PACKAGES:
            self._add_plugin(module)
            return
        if not self._own_files(module):
            raise ModuleNotFoundError(f"no module named '{module}'", name=module)
        folder = self._root.joinpath(*parts[:2])
        if parts[0] in PLUGIN_PACKAGES and len(parts) > 1 and folder.is_dir():
            self._add_folder(folder, self._root)
        self._add_own(module)

    def _add_own(self, module: str) -> None:
        for path in self._own_files(module):
            self._add_file(path, self._root)

    def _own_files(self, module: str) -> list[Path]:
        """A module's file, after those of the packages around it, which importing it runs as well; or none at all."""
        parts = module.split(".")
        around = [self._root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts))]
        own = _source(self._root.joinpath(*parts))
        return [*(p for p in around if p.is_file()), own] if own is not None else []

    def _add_plugin(self, module: str) -> None:
        """The outermost regular package around a module, or else the module itself."""
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            file = _file_of(".".join(parts[:n]))
            namespace = "/".join(parts[: n - 1])
            if file is None:
                continue
            if not file.exists():  # within an archive
                self._add_file(*next((p, p.parent) for p in file.parents if p.is_file()))
            elif file.name == "__init__.py":
                self._add_folder(file.parent, file.parents[1], namespace)
            else:
                self._add_file(file, file.parent, namespace)
            return
        raise ModuleNotFoundError(f"module '{module}' has no file", name=module)

    def _add_beside(self, name: str, parent: Path, namespace: str) -> None:
        """A module or package in the folder ``parent``, if there is one."""
        if (parent / name).is_dir():
            self._add_folder(parent / name, parent, namespace)
            return
        for suffix in all_suffixes():
            if (parent / f"{name}{suffix}").is_file():
                self._add_file(parent / f"{name}{suffix}", parent, namespace)

    def _add_folder(self, folder: Path, base: Path, namespace: str = "") -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(part.endswith(COMPILED) for part in path.relative_to(folder).parts):
                self._add_file(path, base, namespace)

    def _add_file(self, path: Path, base: Path, namespace: str = "") -> None:
        """A file, by its path from ``base`` in a namespace package, and what it imports."""
        relative = path.relative_to(base)
        name = "/".join(filter(None, (namespace, relative.as_posix())))
        if name in self.files:
            return
        self.files[name] = path.read_bytes()
        if path.suffix != ".py":
            return
        around = namespace.split("/") if namespace else []
        for imported in _imports(self.files[name], tuple(name.split("/")[:-1])):
            parts = imported.split(".")
            if parts[0] in OWN_PACKAGES:
                self._add_own(imported)
                continue
            beside = parts[len(around)] if parts[: len(around)] == around and len(parts) > len(around) else None
            if beside is not None and base != self._root and _belongs_with(beside, relative.parts[0], base):
                self._add_beside(beside, base, namespace)


def _belongs_with(top: str, own: str, folder: Path) -> bool:
    """Whether a top-level module in the folder of another one is part of it, and not just installed there too."""
    if folder not in _installed():
        return True
    distributions = _distributions()
    mine = distributions.get(own.removesuffix(".py"), [])
    return bool(set(mine) & set(distributions.get(top, [])))


@functools.cache
def _installed() -> frozenset[Path]:
    """Folders that packages of all kinds are installed into, and the standard library's."""
    paths = sysconfig.get_paths()
    found = {Path(paths[name]) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return frozenset(found | {Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))})


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {name: list(found) for name, found in packages_distributions().items()}


def _file_of(module: str) -> Path | None:
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


def _source(place: Path) -> Path | None:
    """The file of a module: ``place.py``, or ``place/__init__.py``."""
    for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if path.is_file():
            return path
    return None


@functools.cache
def _imports(source: bytes, package: tuple[str, ...]) -> frozenset[str]:
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
