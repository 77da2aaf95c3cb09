"""Paths and files: whole names, one description a file, and no artifact without files or of two blocks."""

from __future__ import annotations

from typing import Final

from toolchain.formats.consistency.names import check_names
from toolchain.formats.manifest import File, Manifest

MOST_NAME_BYTES: Final = 255
"""Of a part of a path; file systems take no more."""


def check_paths(manifest: Manifest) -> None:
    """Hold paths against what file systems take, and files and artifacts against one another.

    Raises:
        ValueError: names the key or the path.
    """
    single = [("recipe", manifest.recipe)]
    single += [("text.tokenizer", manifest.text.tokenizer)] if manifest.text is not None else []
    single += [("golden.file", manifest.golden.file)] if manifest.golden is not None else []
    owned: list[str] = []
    for name, component in manifest.components.items():
        if component.tables_file is not None:
            single.append((f"components.{name}.tables_file", component.tables_file))
        for block in component.blocks:
            where = f"components.{name}.blocks.{block.name}"
            _check_path(f"{where}.artifact", block.artifact)
            if not block.files:
                raise ValueError(f"{where}.files: '{block.artifact}' has no files")
            owned.append(block.artifact)
            single += [(f"{where}.files", file) for file in block.files]
            single += [(f"{where}.goldens", block.goldens)] if block.goldens is not None else []
            check_names(f"{where}.files", [file.path for file in block.files])
    check_names("components: artifacts of blocks", owned)
    known: dict[str, File] = {}
    for where, file in single:
        _check_path(where, file.path)
        if known.setdefault(file.path, file) != file:
            raise ValueError(f"{where}: '{file.path}' is described in two ways")


def _check_path(where: str, path: str) -> None:
    try:
        parts = path.encode().split(b"/")
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: {path!r} is no path") from e
    if not path.isprintable() or any(not part or len(part) > MOST_NAME_BYTES for part in parts):
        raise ValueError(f"{where}: {path!r} is no path")
