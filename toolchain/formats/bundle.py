"""The output folder: written beside its place and moved there whole, read back with its checksums."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolchain.errors import BundleError, RecipeError, ResourceError
from toolchain.formats.consistency import check_manifest
from toolchain.formats.consistency.numbers import check_finite
from toolchain.formats.manifest import FILE_NAME, FORMAT_VERSION, File, Manifest
from toolchain.formats.migrations import migrated
from toolchain.system.claims import claimed_folder, remove_abandoned
from toolchain.system.disk import FULL_ERRORS
from toolchain.system.store import digest
from toolchain.system.temporary import temporary_files_in
from toolchain.validation import explain

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    path: Path
    manifest: Manifest

    def files(self) -> Iterator[File]:
        """Every file that the manifest names."""
        yield self.manifest.recipe
        if self.manifest.text is not None:
            yield self.manifest.text.tokenizer
        for component in self.manifest.components.values():
            if component.tables_file is not None:
                yield component.tables_file
            for block in component.blocks:
                yield from block.files
                if block.goldens is not None:
                    yield block.goldens
        if self.manifest.golden is not None:
            yield self.manifest.golden.file

    def check_files(self) -> None:
        """Hold every file's size and digest against the manifest.

        Raises:
            BundleError: names the first file that is missing or altered.
        """
        for file in self.files():
            path = self.path / file.path
            if not path.is_file():
                raise BundleError(f"'{self.path}': '{file.path}' is missing; build the bundle again")
            if path.stat().st_size != file.bytes or digest(path) != file.sha256:
                raise BundleError(
                    f"'{self.path}': '{file.path}' is not what was built (checksum); build the bundle again"
                )


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle's manifest, an older one too. Files are checked by :meth:`Bundle.check_files`.

    Raises:
        BundleError: it is not a bundle, its manifest contradicts itself or is of a version that this program does not
            know, or a link in it leaves it.
    """
    path = Path(path)
    file = path / FILE_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"'{path}' is not a bundle: no readable {FILE_NAME} in it") from e
    try:
        data = json.loads(text, object_pairs_hook=_said_once)
    except (ValueError, RecursionError) as e:
        raise BundleError(_damaged(file, e)) from e
    bundle = Bundle(path, read_manifest(data, file))
    _refuse_links(path)
    return bundle


def read_manifest(data: Any, file: Path) -> Manifest:
    """A manifest of any known format from plain data, held against itself; the data may be changed in place.

    Args:
        file: what messages say it is from; it is not read.

    Raises:
        BundleError: it is none, contradicts itself, or is of a version that this program does not know.
    """
    try:
        version = data["format_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version {version!r}")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"'{file.parent}' has manifest version {version}, this program knows {FORMAT_VERSION}; "
                "update sora-compile"
            )
        check_finite(data)
        manifest = Manifest.model_validate(migrated(data), strict=True)
    except ValidationError as e:
        raise BundleError(f"'{file}' is damaged: {_one_line(explain(e, Manifest))}") from e
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as e:
        raise BundleError(_damaged(file, e)) from e
    try:
        check_manifest(manifest)
    except ValueError as e:
        raise BundleError(f"'{file}' contradicts itself: {_one_line(str(e))}; build the bundle again") from e
    return manifest


def _damaged(file: Path, error: Exception) -> str:
    return f"'{file}' is damaged: {type(error).__name__}: {_one_line(str(error))}"


LONGEST = 500
"""Characters of what a message shows of a manifest; a stranger may have put a book into it."""


def _one_line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} …"


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two alike, other readers may take the other one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice in one object")
    return found


def _refuse_links(root: Path) -> None:
    """Refuse links that leave a bundle's folder: what is read through them is not the bundle's.

    A hard link is no different from any other file; what it holds is held against its digest.

    Raises:
        BundleError: names the first.
    """
    real = os.path.realpath(root)
    for folder, folders, files in os.walk(root):
        for link in (os.path.join(folder, name) for name in sorted((*folders, *files))):  # noqa: PTH118 - thousands
            if os.path.islink(link) and not os.path.realpath(link).startswith(real + os.sep):  # noqa: PTH114
                own = Path(link).relative_to(root).as_posix()
                raise BundleError(
                    f"'{root}': '{own}' is a link that leaves the bundle; copy it with its files (cp -rL)"
                )


def describe_file(path: Path, root: Path) -> File:
    """A file's entry in the manifest."""
    return File(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest(path))


def check_place(out: Path) -> None:
    """Refuse a place that holds something else than a bundle.

    Raises:
        RecipeError: ``out`` exists and is not a bundle.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not (out / FILE_NAME).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise RecipeError(f"-o {out}: exists and is not a bundle; choose another folder or remove it")


def prepare(out: Path) -> Path:
    """Refuse a place that holds something else, and remove what killed runs left beside it; its absolute path.

    Raises:
        RecipeError: ``out`` exists and is not a bundle.
    """
    check_place(out)
    out = Path(os.path.abspath(out))
    for prefix in (_partial(out), f".{out.name}.old-"):  # earlier versions put what they replaced into the second
        remove_abandoned(out.parent, prefix)
    return out


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder to build in, moved to ``out`` when the body ends well and removed when it does not.

    An older bundle at ``out`` stands until then. What earlier runs left behind when they were killed is
    removed first.

    Raises:
        RecipeError: ``out`` exists and is not a bundle.
        ResourceError: the folder cannot be written, or the disk is full.
    """
    out = prepare(out)
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(_remove_empty, [p for p in out.parents if not p.exists()])
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            claimed = afterwards.enter_context(claimed_folder(out.parent, _partial(out)))
            folder, temporary = claimed / "bundle", claimed / "temporary"
            folder.mkdir()
            folder.chmod(0o755)
            temporary.mkdir()
        except OSError as e:
            raise ResourceError(f"-o {out}: cannot be written: {e.strerror or e}") from e
        try:
            with temporary_files_in(temporary):
                yield folder
            _replace(folder, out, claimed / "replaced")
        except OSError as e:
            if e.errno not in FULL_ERRORS:
                raise
            free = shutil.disk_usage(out.parent).free
            raise ResourceError(f"-o {out}: the disk is full ({free / 1e6:.0f} MB free); nothing was written") from e


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, when all went well
            folder.rmdir()


def _replace(folder: Path, out: Path, old: Path) -> None:
    """Move ``folder`` to ``out``; what is there goes to ``old``, and comes back if that fails."""
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _partial(out: Path) -> str:
    """What the names of folders begin with in which builds of ``out`` take place."""
    return f".{out.name}.partial-"
