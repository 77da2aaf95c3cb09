"""The output folder: written beside its place and moved there whole, read back with its checksums."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from toolchain.errors import BundleError, RecipeError, ResourceError
from toolchain.formats.manifest import FILE_NAME, FORMAT_VERSION, File, Manifest
from toolchain.formats.migrations import migrated
from toolchain.system.store import digest, process_alive
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
        BundleError: it is not a bundle, or of a version that this program does not know.
    """
    path = Path(path)
    file = path / FILE_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"'{path}' is not a bundle: no readable {FILE_NAME} in it") from e
    try:
        data = json.loads(text)
        version = data.get("format_version", 1)
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version {version!r}")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"'{path}' has manifest version {version}, this program knows {FORMAT_VERSION}; update sora-compile"
            )
        return Bundle(path, Manifest.model_validate(migrated(data)))
    except ValidationError as e:
        raise BundleError(f"'{file}' is damaged: {explain(e, Manifest)}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BundleError(f"'{file}' is damaged: {type(e).__name__}: {' '.join(str(e).split())}") from e


def describe_file(path: Path, root: Path) -> File:
    """A file's entry in the manifest."""
    return File(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest(path))


def prepare(out: Path) -> Path:
    """Refuse a place that holds something else, and remove what killed runs left beside it; its absolute path.

    Raises:
        RecipeError: ``out`` exists and is not a bundle.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not (out / FILE_NAME).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise RecipeError(f"-o {out}: exists and is not a bundle; choose another folder or remove it")
    _remove_leftovers(out)
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
    above = [p for p in out.parents if not p.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-{os.getpid()}-"))
        folder.chmod(0o755)
    except OSError as e:
        raise ResourceError(f"-o {out}: cannot be written: {e.strerror or e}") from e
    scratch = folder.with_name(f"{folder.name}.scratch")
    usual = tempfile.tempdir
    try:
        scratch.mkdir()
        tempfile.tempdir = str(scratch)  # converters leave large files behind: let them go with the build
        yield folder
        _replace(folder, out)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(out.parent).free
            raise ResourceError(f"-o {out}: the disk is full ({free / 1e6:.0f} MB free); nothing was written") from e
        raise
    finally:
        tempfile.tempdir = usual
        for left in (folder, scratch):
            shutil.rmtree(left, ignore_errors=True)
        for made in above:
            with contextlib.suppress(OSError):  # not empty, when all went well
                made.rmdir()


def _replace(folder: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    for kind in ("partial", "old"):
        prefix = f".{out.name}.{kind}-"
        for left in out.parent.glob(f"{glob.escape(prefix)}*") if out.parent.is_dir() else ():
            pid = left.name.removeprefix(prefix).split("-")[0]
            if pid.isdigit() and not process_alive(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
