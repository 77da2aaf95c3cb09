"""Files that a user asks for: refused before any work is done, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from toolchain.errors import RecipeError, ResourceError


def check_folder(option: str, path: Path) -> None:
    """Refuse a file (or folder) that could not be made for want of the folder that it is to lie in.

    Raises:
        ResourceError: that folder does not exist or cannot be written.
    """
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ResourceError(f"{option} {path}: its folder does not exist or cannot be written")


def check_file(option: str, path: Path) -> None:
    """Refuse, before any work is done, a file that could not be written.

    Raises:
        RecipeError: a folder of that name stands there.
        ResourceError: as :func:`check_folder`.
    """
    if path.is_dir():
        raise RecipeError(f"{option} {path}: is a folder; expected the name of a file")
    check_folder(option, path)


@contextlib.contextmanager
def whole_file(path: Path, option: str = "-o") -> Iterator[Path]:
    """Where to write a file, which becomes ``path`` when the body ends well and is removed when it does not.

    Raises:
        ResourceError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as e:
        raise ResourceError(f"{option} {path}: cannot be written: {e.strerror or e}") from e
    finally:
        partial.unlink(missing_ok=True)


def read_lines(option: str, path: Path) -> list[str]:
    """A text file's lines without those that are empty.

    Raises:
        RecipeError: it cannot be read, or is no text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise RecipeError(f"{option} {path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise RecipeError(f"{option} {path}: is no text in UTF-8") from e
    return [line.strip() for line in text.splitlines() if line.strip()]
