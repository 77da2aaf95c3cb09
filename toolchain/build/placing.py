"""Putting what the store holds where it belongs in a bundle."""

from __future__ import annotations

from pathlib import Path

from toolchain.build.artifacts import ARTIFACT_STEM
from toolchain.build.gate import Passed
from toolchain.formats.bundle import describe_file
from toolchain.formats.manifest import File
from toolchain.system.store import Entry, clone_or_copy


def place_artifact(artifact: Entry, out: Path, folder: Path) -> list[File]:
    """An artifact's files at ``out``, a file or a package, in the bundle ``folder``."""
    files = []
    for file in artifact.files:
        path = Path(f"{out}{file.path.removeprefix(ARTIFACT_STEM + out.suffix)}")
        clone_or_copy(artifact.data / file.path, path)
        files.append(File(path=path.relative_to(folder).as_posix(), bytes=file.bytes, sha256=file.sha256))
    return sorted(files, key=lambda f: f.path)


def place_goldens(passed: Passed | None, path: Path, folder: Path) -> File | None:
    """The goldens of a block that was executed, if it has any."""
    if passed is None or passed.goldens is None:
        return None
    clone_or_copy(passed.goldens, path)
    return describe_file(path, folder)
