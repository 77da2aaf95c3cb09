"""Digests of code: what is built depends on the code that builds it, so its key holds one.

Code is followed by reading it, without running it: from a module to all that it imports, wherever in it the import
stands, except under ``if TYPE_CHECKING``. What is imported by a computed name is not seen. Libraries from elsewhere
are no part of it; their versions are the keys' business (:meth:`toolchain.ir.target.Target.versions`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Collection, Mapping
from importlib.machinery import all_suffixes
from importlib.metadata import packages_distributions
from pathlib import Path

from toolchain.errors import ResourceError
from toolchain.system.imports import file_of, imports_of
from toolchain.system.store import NewEntry, Store, key_of

OWN_PACKAGES = ("toolchain", "passes", "targets", "recipes")
PLUGIN_PACKAGES = ("targets", "passes")
"""Those of ours in which a package is a plug-in: all of its files count, whether or not something imports them."""
ROOT = Path(__file__).parents[2]
"""The folder that our own packages are in."""
KnownImports = Mapping[str, Collection[str]]
COMPILED = ("__pycache__", ".pyc", ".pyo")


@functools.cache
def code_digest(*modules: str, store: Store | None = None) -> str:
    """sha256, in hex, of the code that modules consist of and depend on; remembered while the process lives.

    Of our own packages, that is each module's file and those of ours that it imports, directly or not; and all the
    files of a target's or a pass's own package. Of a plug-in it is its whole top-level package, or its single file,
    with what lies beside it and is imported, and what it imports of ours.

    Args:
        modules: dotted names, of modules that can be imported.
        store: remembers what our own files import, or else they are parsed, which takes a third of a second.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    return digest_of_code(ROOT, *modules, known=None if store is None else _known_imports(store))


def digest_of_code(root: Path, *modules: str, known: KnownImports | None = None) -> str:
    """As :func:`code_digest`, with our own packages in the folder ``root``; nothing is remembered.

    Args:
        known: what files import, by :func:`_content`; the others are parsed.
    """
    found = _Closure(root, known or {})
    for module in modules:
        found.add_root(module)
    whole = hashlib.sha256()
    for name, content in sorted(found.files.items()):
        whole.update(f"{len(name.encode())} {len(content)}\n{name}".encode())
        whole.update(content)
    return whole.hexdigest()


@functools.cache
def _known_imports(store: Store) -> KnownImports:
    """What our own files import, as they are now."""
    files = [p for package in OWN_PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    sources = {_content(p.relative_to(ROOT).as_posix(), source): source for p in files for source in [p.read_bytes()]}
    key = key_of({"python": sys.version, "files": list(sources)})
    found = store.get("imports", key)
    if found is not None:
        return dict(found.meta)
    known = {c: sorted(imports_of(source, _package(c.partition(" ")[0]))) for c, source in sources.items()}
    with contextlib.suppress(ResourceError):  # they will be parsed again
        store.get_or_make("imports", key, lambda _: NewEntry(known))
    return known


def _content(name: str, source: bytes) -> str:
    """A file's name and digest: what decides which modules it imports."""
    return f"{name} {hashlib.sha256(source).hexdigest()}"


def _package(name: str) -> tuple[str, ...]:
    return tuple(name.split("/")[:-1])


class _Closure:
    """What modules depend on: the content of ``files``, by names that are the same wherever they are installed."""

    def __init__(self, root: Path, known: KnownImports) -> None:
        self.files: dict[str, bytes] = {}
        self._root, self._known = root, known
        self._followed: set[str] = set()
        self._listed: dict[tuple[str, ...], frozenset[str]] = {}

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
        if module in self._followed:
            return
        self._followed.add(module)
        for path in self._own_files(module):
            self._add_file(path, self._root)

    def _own_files(self, module: str) -> list[Path]:
        """A module's file, after those of the packages around it, which importing it runs as well; or none at all."""
        parts = tuple(module.split("."))
        if "__init__.py" in self._names(parts):
            own = (*parts, "__init__.py")
        elif f"{parts[-1]}.py" in self._names(parts[:-1]):
            own = (*parts[:-1], f"{parts[-1]}.py")
        else:
            return []
        around = [(*parts[:n], "__init__.py") for n in range(1, len(parts)) if "__init__.py" in self._names(parts[:n])]
        return [self._root.joinpath(*place) for place in (*around, own)]

    def _names(self, folder: tuple[str, ...]) -> frozenset[str]:
        """What a folder below the root holds; nothing if it is none."""
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(p.name for p in self._root.joinpath(*folder).iterdir())
            except OSError:
                self._listed[folder] = frozenset()
        return self._listed[folder]

    def _add_plugin(self, module: str) -> None:
        """The outermost regular package around a module, or else the module itself."""
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            file = file_of(".".join(parts[:n]))
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
        source, known = self.files[name], self._known.get(_content(name, self.files[name]))
        for imported in known if known is not None else imports_of(source, _package(name)):
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
