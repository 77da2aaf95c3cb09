"""An artifact's files: what is in them, in what two differ, and copies that are damaged."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def content(path: Path) -> dict[str, bytes]:
    """Bytes of a file, or of all files below a folder, by their path in it."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def difference(one: Path, other: Path) -> str:
    """In what two artifacts differ; empty if they are the same, byte for byte."""
    a, b = content(one), content(other)
    for name in sorted(a.keys() | b.keys()):
        shown = f"'{name or one.name}'"
        if name not in a or name not in b:
            return f"{shown} is in one artifact and not in the other"
        if a[name] != b[name]:
            at = next((i for i, (x, y) in enumerate(zip(a[name], b[name], strict=False)) if x != y), len(a[name]))
            return f"{shown} differs from byte {at} on ({len(a[name])} and {len(b[name])} bytes)"
    return ""


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Ruined:
    """A damaged copy of an artifact, and in what way."""

    path: Path
    what: str


def ruined(artifact: Path, folder: Path) -> Iterator[Ruined]:
    """Copies of an artifact in which one file is cut in half, empty or missing; each is gone after its turn."""
    for name, data in content(artifact).items():
        for what, left in (("cut in half", data[: len(data) // 2]), ("empty", b""), ("missing", None)):
            if left == data or (left is None and not name):
                continue
            folder.mkdir()
            copy = folder / artifact.name
            if name:
                shutil.copytree(artifact, copy)
            file = copy / name if name else copy
            if left is None:
                file.unlink()
            else:
                file.write_bytes(left)
            yield Ruined(copy, f"'{name or artifact.name}' {what}")
            shutil.rmtree(folder)
